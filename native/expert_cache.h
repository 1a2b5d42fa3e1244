// Experts in memory: slots that are allocated once, which experts are in them, and the reads that fill them.
//
// A group is the routed experts of one layer; its parts are the weights each expert is made of (up, gate,
// down). A pass is one use of a group: the experts that a token, or a micro-batch of tokens, was routed to.
// Parts of a pass are asked for one after another, each once.
#pragma once

#include "policy.h"
#include "reader.h"

#include <array>
#include <functional>

namespace tt {

inline constexpr size_t MAX_PARTS = 4;

struct PartSpec {
    int file = 0;
    uint64_t offset = 0; // of expert 0; the others follow
    uint64_t nbytes = 0; // of one expert
};
struct GroupSpec {
    int experts = 0;
    std::vector<PartSpec> parts;
};

struct CacheOptions {
    PolicyKind policy = PolicyKind::lru;
    std::vector<double> frequency; // for the fixed policy: [group][most experts of a group]
    uint64_t bytes = 0;            // of all slots
    int used = 1;                  // experts that a token uses in a layer
};

struct GroupTotals {
    uint64_t uses = 0; // distinct experts, summed over passes
    uint64_t hits = 0; // of these, resident when the pass began
    uint64_t passes = 0;
    uint64_t bytes = 0;       // asked of the drive, without the rest of sectors
    double stall_seconds = 0; // waited with nothing to compute
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
    int group = -1; // whose expert is in it; -1: nobody's
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
    struct Layout {
        size_t slot_bytes = 0;
        std::array<size_t, MAX_PARTS> offset{}; // of the part's area in the slot
        std::array<size_t, MAX_PARTS> lead{};   // of the data in the area, the same for all experts
        size_t largest_area = 0;
    };
    Layout lay_out(const GroupSpec & group) const;
    void share_out();
    void add_segment(size_t stride, int count, bool passing, int group);
    void build(Pass & pass, const std::vector<int32_t> & ids, int tokens, int used) const;
    void read(int group, int part, int slot, int expert);
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
    std::vector<Layout> layouts_;
    std::vector<GroupTotals> totals_;
    int most_experts_ = 0;
    uint64_t nbytes_ = 0;
    std::vector<int> capacity_; // per group, or one for all
    std::vector<Segment> segments_;
    std::vector<size_t> segment_offset_;
    std::vector<Slot> slots_;
    std::vector<int> passing_;           // slots for experts that do not stay
    std::vector<std::vector<int>> free_; // slots of their own that hold nothing: per group, or one list
    std::vector<int32_t> resident_slot_; // [group][expert]
    std::unique_ptr<Policy> policy_;
    std::vector<Pass> passes_;               // per group
    std::vector<std::vector<size_t>> order_; // per group: of its parts, as the last whole pass asked for them
    std::vector<Placing> misses_;
    bool checked_ = false; // that the files are what they were
};

} // namespace tt
