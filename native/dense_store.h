// Weights that every token uses, in the same order each time: some stay in memory, the others pass through a
// ring, the next ones being read while this one is computed. (For a cycle an LRU would be the worst policy.)
#pragma once

#include "reader.h"

#include <deque>
#include <functional>

namespace tt {

struct DenseSpec {
    int file = 0;
    uint64_t offset = 0;
    uint64_t nbytes = 0;
    bool stays = false; // always in memory, beside the budget: small things that experts are used with
};

struct DenseTotals {
    uint64_t uses = 0;
    uint64_t hits = 0;        // in memory when asked for
    uint64_t bytes = 0;       // asked of the drive
    double stall_seconds = 0; // waited with nothing to compute
};

class DenseStore {
public:
    // The weights in the order of their use. ReadError where `bytes` cannot hold the largest of them.
    DenseStore(std::vector<DenseSpec> specs, uint64_t bytes, Reader & reader);

    uint64_t nbytes() const { return nbytes_; }
    void attach(char * memory);
    // Reads all that stays. ReadError where that fails, or where `stop`, asked now and then, says so.
    void load(const std::function<bool()> & stop);

    // Where the weight is, or null while it is not there yet: wait for a read to end and ask again. After
    // `full` is set, ask again when something was given back.
    char * acquire(size_t id, bool & full);
    // Gives a weight back, which may leave the ring then, and reads on.
    void give_back(size_t id);
    // After an error: waits for all reads and forgets what they did not bring.
    void recover();

    DenseTotals & totals() { return totals_; }
    const DenseTotals & totals() const { return totals_; }
    uint64_t resident_bytes() const { return ring_begin_; }
    uint64_t ring_bytes() const { return nbytes_ - ring_begin_; }
    size_t size() const { return items_.size(); }

private:
    struct Item {
        DenseSpec spec;
        uint64_t area = 0; // bytes
        bool stays = false;
        uint64_t at = 0; // of the area in our memory
        bool placed = false;
        bool counted = false; // this use of it, as a hit or not
        int users = 0;
        ReadState state = ReadState::none;
        size_t next = 0; // asked for after this one, the last time
    };
    void choose(uint64_t bytes);
    void read(Item & item);
    bool place(size_t id);
    void leave(size_t id);
    bool make_room();
    void read_ahead();

    std::vector<Item> items_;
    Reader & reader_;
    DenseTotals totals_;
    uint64_t nbytes_ = 0;
    uint64_t ring_begin_ = 0;
    struct Stretch { // of the ring
        size_t id;
        uint64_t at;
        uint64_t area;
        bool taken; // false: given back, but somebody before it is still there
    };
    std::deque<Stretch> ring_; // the oldest first
    size_t last_asked_ = 0;    // of those that pass through
    size_t last_read_ = 0;
    bool any_asked_ = false;
    char * memory_ = nullptr;
};

} // namespace tt
