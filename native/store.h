// Everything about one model's paged weights: which tensor is where in the files, the memory for what is in
// use, statistics and the routing trace. One store may serve several contexts, one at a time.
#pragma once

#include "dense_store.h"
#include "expert_cache.h"
#include "ggml_api.h"
#include "routers.h"
#include "tensortier.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>

namespace tt {

// A tensor whose data stays on the drive: what its `extra` points to.
struct Weight {
    enum class Kind { expert, dense };
    Kind kind = Kind::dense;
    int group = 0; // expert: which
    int part = 0;
    size_t dense = 0; // dense: which
    int file = 0;
    uint64_t offset = 0;
    uint64_t nbytes = 0;
    Tensor * tensor = nullptr;
    int64_t shape[MAX_DIMS] = {}; // while `tensor` does without one
    class Store * store = nullptr;
};

// Address space, and memory in it, that goes when this goes.
class Memory {
public:
    // `committed`: filled with zeroed pages at once, and locked where the system allows it.
    Memory(uint64_t nbytes, bool committed);
    ~Memory();
    Memory(const Memory &) = delete;
    Memory & operator=(const Memory &) = delete;
    char * data() const { return data_; }
    uint64_t nbytes() const { return nbytes_; }
    bool locked() const { return locked_; }

private:
    char * data_ = nullptr;
    uint64_t nbytes_ = 0;
    bool locked_ = false;
};

// How many experts would stay of each group, or of all together, on a drive with such sectors.
std::vector<int> capacities(const tt_tier_config & config, uint64_t sector);

class Store {
public:
    explicit Store(const tt_tier_config & config);
    ~Store();
    Store(const Store &) = delete;
    Store & operator=(const Store &) = delete;

    // The weight a tensor of this name is, or null.
    Weight * find(const char * name);
    // Takes a tensor's shape away, so that llama.cpp, which reads as many bytes as a tensor has, reads none.
    void hide(Weight & weight, Tensor * tensor);
    // Gives all of them their shape back, and reads what always stays.
    void loaded(const std::function<bool()> & stop);
    // Reads experts into free slots, as ExpertCache::warm; what the model does not have is left out.
    size_t warm(const int32_t * pairs, size_t count, const std::function<bool()> & stop);
    // The model is gone.
    void forget_tensors();

    // Held by whoever computes with this store's weights. Everything below needs it.
    std::mutex mutex;

    Reader & reader() { return *reader_; }
    ExpertCache * experts() { return experts_.get(); }
    DenseStore * dense() { return dense_.get(); }
    void read_weight(const Weight & weight, uint64_t offset, uint64_t nbytes, void * target);
    // Remembers why a computation failed, and brings everything into a state to go on from.
    void failed(const std::string & reason);
    std::string take_error();
    // Routing is written to this file from now on; null: no more. ReadError where it cannot be written.
    void trace(const char * path);
    void stats(tt_tier_stats & stats) const;
    // Memory for rows that are gathered and computed apart, in the place of what it last returned. It grows
    // and stays: blocks of many sizes from the heap would leave holes, which nobody counts.
    char * rows(uint64_t nbytes);
    // So much else was taken by what waits to be computed.
    void scratch_beside(uint64_t nbytes) { scratch_beside_ = std::max(scratch_beside_, nbytes); }
    // Of the routers of each group of experts, in order; empty where nothing is to be read ahead.
    std::vector<Router> routers;
    // Whether to read ahead for the next group now.
    bool guessing() const { return !routers.empty() && (always_guess_ || trial_.guessing()); }
    size_t guesses() const { return guesses_; }
    size_t used() const { return used_; }

private:
    void write_trace(int group, const Pass & pass);
    void time(int group, const Pass & pass);

    std::vector<Weight> weights_;
    std::map<std::string, Weight *> by_name_;
    std::vector<Weight *> hidden_;
    std::unique_ptr<Reader> reader_;
    std::unique_ptr<ExpertCache> experts_;
    std::unique_ptr<DenseStore> dense_;
    std::unique_ptr<Memory> memory_;
    std::unique_ptr<Memory> rows_;
    uint64_t scratch_beside_ = 0; // at most
    Trial trial_;
    bool always_guess_ = false;
    size_t guesses_ = 0, used_ = 1;
    std::FILE * trace_ = nullptr;
    std::string trace_path_;
    std::string error_;
};

} // namespace tt
