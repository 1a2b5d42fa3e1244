// Experts in memory: slots that are allocated once, which experts are in them, and the reads that fill them.
//
// A group is the routed experts of one layer; its parts are the weights each expert is made of (up, gate,
// down). A pass is one use of a group: the experts that a token, or a micro-batch of tokens, was routed to.
// Parts of a pass are asked for one after another, each once.
#pragma once

#include "policy.h"
#include "reader.h"
#include "sharing.h"

#include <array>
#include <functional>

namespace tt {

struct GroupTotals {
    uint64_t uses = 0; // distinct experts, summed over passes
    uint64_t hits = 0; // of these, resident when the pass began
    uint64_t passes = 0;
    uint64_t bytes = 0;       // asked of the drive, without the rest of sectors
    double stall_seconds = 0; // waited with nothing to compute
    uint64_t guess_uses = 0;  // uses of passes for which there was a guess
    uint64_t guess_named = 0; // of these, among the likeliest that a pass may use
    uint64_t guess_reads = 0; // experts that were read ahead
    uint64_t guess_found = 0; // of these, used in the pass that they were read for
};

// Slots at equal distances, so that one tensor can show all of them. A slot is for all parts of an expert
// that stays, or for a single part of one that passes through.
struct Segment {
    char * base = nullptr;
    size_t stride = 0;
    int count = 0;
    bool passing = false;
};

struct Slot {
    int segment = 0;
    int index = 0; // in its segment
    char * base = nullptr;
    bool passing = false;
    bool guessed = false; // passing: read ahead for the group's next pass
    int group = -1;       // whose expert is in it; -1: nobody's
    int expert = -1;
    std::array<ReadState, MAX_PARTS> state{};
};

struct Routed { // one choice of one token
    int32_t token;
    int32_t use;
};

struct Pass {
    bool valid = false;
    int tokens = 0;
    int used = 0;
    std::vector<int32_t> ids;     // [token][use]
    std::vector<int32_t> experts; // distinct, in order of first use
    std::vector<Routed> routed;   // by expert
    std::vector<size_t> first;    // experts[i] has routed[first[i]] to routed[first[i + 1]] exclusive
    std::vector<int32_t> place;   // [part][i]: the slot, UNPLACED or FINISHED
    std::vector<uint8_t> stays;   // [i]
    std::vector<size_t> asked;    // parts, in the order in which they were asked for
};

class ExpertCache {
public:
    static constexpr int32_t UNPLACED = -1;
    static constexpr int32_t FINISHED = -2;

    // What the slots will take. ReadError where `options.bytes` cannot hold the experts of one token.
    ExpertCache(std::vector<GroupSpec> groups, CacheOptions options, Reader & reader);

    uint64_t nbytes() const { return nbytes_; }
    // Gives it its memory: nbytes() bytes, aligned to a page, that outlive it.
    void attach(char * memory);

    // The same pass as the last one of this group, asked for another part of it?
    bool same_pass(int group, int part, const std::vector<int32_t> & ids) const;
    // Begins a pass, or goes on with it. What is missing starts to be read.
    Pass & begin(int group, int part, const std::vector<int32_t> & ids, int tokens, int used);
    // Gives slots to experts of the pass that have none yet, as far as there are free ones.
    void pump(int group, int part);
    // The slot with this part of experts[i], or null while it is not there. ReadError when its read failed.
    const Slot * arrived(int group, int part, size_t i);
    // This part of experts[i] was computed and is not needed again in this pass.
    void finished(int group, int part, size_t i);
    // The experts that the group's next pass will use, likeliest first; the first `named` of them are what it
    // would use if the guess were right. At most `most` are read ahead, as far as there are slots that
    // nothing else passes through.
    void guess(int group, const std::vector<int32_t> & experts, size_t named, size_t most);
    // Fills free slots with experts that are likely to be used: (group, expert), likeliest last. Waits for
    // the reads, which may fail without consequence. How many were read. ReadError where `stop` says so.
    size_t warm(const std::vector<std::pair<int32_t, int32_t>> & experts, const std::function<bool()> & stop);
    bool has(int group, int expert) const {
        return group >= 0 && static_cast<size_t>(group) < groups_.size() && expert >= 0 &&
               expert < groups_[static_cast<size_t>(group)].experts;
    }
    // What is in memory, in that order: by group, the longest unused first.
    std::vector<std::pair<int32_t, int32_t>> residents() const;
    // After an error: waits for all reads and forgets what they did not bring.
    void recover();

    // Where in each slot of a segment the data of this part begins.
    size_t offset_in_slot(int group, int part, int segment) const;
    const Segment & segment(int index) const { return segments_[static_cast<size_t>(index)]; }

    GroupTotals & totals(int group) { return totals_[static_cast<size_t>(group)]; }
    size_t groups() const { return groups_.size(); }
    int capacity(int group) const; // experts that stay (of all groups together for a global policy)
    int own_slots() const { return static_cast<int>(slots_.size() - passing_.size()); }
    int passing_slots() const { return static_cast<int>(passing_.size()); }
    // Called with each new pass: group, tokens, used, ids.
    std::function<void(int, const Pass &)> on_pass;

private:
    void share_out_slots();
    void add_segment(size_t stride, int count, bool passing, int group);
    void build(Pass & pass, const std::vector<int32_t> & ids, int tokens, int used) const;
    void use_guesses(Pass & pass, int group);
    void give_up(int slot);
    void forget_guess(int slot);
    int guessed_slot(int group, int expert, size_t part) const;
    int idle_passing() const;
    bool loading(const Slot & slot) const;
    void read(int group, int part, int slot, int expert, bool ahead = false);
    void settle(int slot); // waits until nothing is read into it
    int take_passing(int group, int part);
    int take_free(int group);
    void release(int slot);
    bool asked(const Pass & pass, size_t part) const;
    size_t where(int group, int expert) const {
        return static_cast<size_t>(group) * static_cast<size_t>(most_experts_) + static_cast<size_t>(expert);
    }
    bool global() const { return options_.policy == PolicyKind::global_lru; }

    std::vector<GroupSpec> groups_;
    CacheOptions options_;
    Reader & reader_;
    std::vector<SlotLayout> layouts_;
    std::vector<GroupTotals> totals_;
    int most_experts_ = 0;
    uint64_t nbytes_ = 0;
    std::vector<int> capacity_; // per group, or one for all
    std::vector<Segment> segments_;
    std::vector<size_t> segment_offset_;
    std::vector<Slot> slots_;
    std::vector<int> passing_;                // slots for experts that do not stay
    std::vector<std::vector<int>> free_;      // slots of their own that hold nothing: per group, or one list
    std::vector<int32_t> resident_slot_;      // [group][expert]
    std::vector<std::vector<int32_t>> named_; // per group: by a guess for its next pass
    std::unique_ptr<Policy> policy_;
    std::vector<Pass> passes_;               // per group
    std::vector<std::vector<size_t>> order_; // per group: of its parts, as the last whole pass asked for them
    std::vector<Placing> misses_;
    bool checked_ = false; // that the files are what they were
};

} // namespace tt
