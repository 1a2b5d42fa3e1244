// Which experts stay in memory. Works on ids only: no ggml, no threads, no clock, so that a recorded routing
// can be replayed through the very code that decides while a model runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace tt {

enum class PolicyKind : int32_t {
    lru = 0,      // of each layer by itself: the least recently used one leaves
    global_lru,   // of all layers together
    lfu,          // of each layer: the least often used one leaves; counts are halved as they age
    fixed,        // of each layer: those with the highest given frequencies, and no others
    second_touch, // as lru, but a new one stays only if it was used shortly before
};

struct PolicyOptions {
    PolicyKind kind = PolicyKind::lru;
    int groups = 0;                // layers with experts
    int experts = 0;               // the most that a group has
    std::vector<int> capacity;     // experts that stay, per group; for global_lru one number for all
    std::vector<double> frequency; // fixed: [groups][experts]
};

// What becomes of one expert that was not in memory.
struct Placing {
    int32_t expert = -1;
    bool stays = false;         // false: it is used now and not remembered
    int32_t evicted_group = -1; // who leaves for it; -1: there was room
    int32_t evicted_expert = -1;
};

class Policy {
public:
    // Null, with the reason in `error`, where the options make no sense.
    static std::unique_ptr<Policy> make(const PolicyOptions & options, std::string & error);
    virtual ~Policy() = default;

    // A pass through a group that uses the given experts, each once, in the order of first use. Those not
    // resident are put into `misses` with what becomes of them. An expert used in this pass never leaves in
    // it.
    void visit(int group, const int32_t * experts, size_t count, std::vector<Placing> & misses);

    bool resident(int group, int expert) const { return resident_[key(group, expert)] != 0; }
    // Those of a group, the longest unused first.
    std::vector<int32_t> residents(int group) const;

    // Forgets a resident expert that is not in memory after all, such as after a failed read.
    void drop(int group, int expert);

protected:
    explicit Policy(PolicyOptions options);

    size_t key(int group, int expert) const {
        return static_cast<size_t>(group) * static_cast<size_t>(options_.experts) +
               static_cast<size_t>(expert);
    }
    // The room that the group shares in.
    size_t domain(int group) const { return global() ? 0 : static_cast<size_t>(group); }
    bool global() const { return options_.kind == PolicyKind::global_lru; }
    bool in_this_pass(size_t k) const { return last_use_[k] >= pass_start_; }

    // The key that should leave for `incoming`, or NONE when it should rather not stay itself.
    virtual size_t victim(int group, size_t incoming) = 0;
    // Whether `incoming` may take a free place.
    virtual bool wanted(int group, size_t incoming) = 0;
    // For policies that keep books of their own. `used` comes for each use, after last_use_ was set; `before`
    // is what it was. `came` and `left` tell of residents, `visited` of the end of a pass.
    virtual void used(int /*group*/, size_t /*k*/, uint64_t /*before*/) {}
    virtual void came(size_t /*k*/) {}
    virtual void left(size_t /*k*/) {}
    virtual void visited(int /*group*/) {}

    // The least recently used resident of a group that is not in this pass, or NONE.
    size_t oldest(int group) const;

    static constexpr size_t NONE = static_cast<size_t>(-1);

    PolicyOptions options_;
    std::vector<uint64_t> last_use_;   // per key; 0: never
    std::vector<uint8_t> resident_;    // per key
    std::vector<int> count_;           // residents per domain
    std::vector<uint64_t> last_visit_; // per group: the time its last pass began
    uint64_t now_ = 0;                 // one tick per use
    uint64_t pass_start_ = 0;          // the first tick of this pass
    uint64_t previous_pass_start_ = 0; // of this group
};

} // namespace tt
