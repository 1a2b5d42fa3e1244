#include "policy.h"

#include "tensortier.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <utility>

namespace tt {
namespace {

class Lru : public Policy {
public:
    explicit Lru(PolicyOptions options) : Policy(std::move(options)) {}

protected:
    size_t victim(int group, size_t) override { return oldest(group); }
    bool wanted(int, size_t) override { return true; }
};

// A plain global LRU falls off a cliff: with less room than one token uses over all layers, everything leaves
// just before it is used again, and nothing is ever found. So nobody leaves that was used since this group's
// last pass; the newcomer does not stay then, and what is there goes on being found.
class GlobalLru : public Policy {
public:
    explicit GlobalLru(PolicyOptions options) : Policy(std::move(options)) {}

protected:
    size_t victim(int, size_t) override {
        if (order_.empty()) {
            return NONE;
        }
        const auto [time, k] = *order_.begin();
        return time >= previous_pass_start_ || in_this_pass(k) ? NONE : k;
    }
    bool wanted(int, size_t) override { return true; }
    void used(int, size_t k, uint64_t before) override {
        if (resident_[k]) {
            order_.erase({before, k});
            order_.insert({last_use_[k], k});
        }
    }
    void came(size_t k) override { order_.insert({last_use_[k], k}); }
    void left(size_t k) override { order_.erase({last_use_[k], k}); }

private:
    std::set<std::pair<uint64_t, size_t>> order_; // residents by their last use
};

class Lfu : public Policy {
public:
    explicit Lfu(PolicyOptions options)
        : Policy(std::move(options)), uses_(last_use_.size(), 0.0f), visits_(last_visit_.size(), 0) {}

protected:
    size_t victim(int group, size_t incoming) override {
        size_t found = NONE;
        for (size_t k = key(group, 0); k < key(group, options_.experts); ++k) {
            if (resident_[k] && !in_this_pass(k) && (found == NONE || less(k, found))) {
                found = k;
            }
        }
        return found != NONE && uses_[found] > uses_[incoming] ? NONE : found;
    }
    bool wanted(int, size_t) override { return true; }
    void used(int, size_t k, uint64_t) override { uses_[k] += 1.0f; }
    void visited(int group) override {
        int & visits = visits_[static_cast<size_t>(group)];
        if (++visits == HALF_LIFE) {
            visits = 0;
            for (size_t k = key(group, 0); k < key(group, options_.experts); ++k) {
                uses_[k] *= 0.5f;
            }
        }
    }

private:
    static constexpr int HALF_LIFE = 256; // passes: a few hundred tokens of a conversation
    bool less(size_t a, size_t b) const {
        return uses_[a] < uses_[b] || (uses_[a] == uses_[b] && last_use_[a] < last_use_[b]);
    }
    std::vector<float> uses_; // per key, aged
    std::vector<int> visits_; // per group, since the last ageing
};

class Fixed : public Policy {
public:
    explicit Fixed(PolicyOptions options) : Policy(std::move(options)), chosen_(last_use_.size(), 0) {
        for (int group = 0; group < options_.groups; ++group) {
            std::vector<size_t> order;
            for (size_t k = key(group, 0); k < key(group, options_.experts); ++k) {
                order.push_back(k);
            }
            std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
                return options_.frequency[a] > options_.frequency[b];
            });
            const size_t room = static_cast<size_t>(options_.capacity[static_cast<size_t>(group)]);
            for (size_t i = 0; i < std::min(room, order.size()); ++i) {
                chosen_[order[i]] = 1;
            }
        }
    }

protected:
    size_t victim(int, size_t) override { return NONE; }
    bool wanted(int, size_t incoming) override { return chosen_[incoming] != 0; }

private:
    std::vector<uint8_t> chosen_;
};

// An expert used once and not again for long would push out one that is used often. "Shortly before" is what
// an LRU of twice the room would still remember.
class SecondTouch : public Policy {
public:
    explicit SecondTouch(PolicyOptions options)
        : Policy(std::move(options)), previous_use_(last_use_.size(), 0) {}

protected:
    size_t victim(int group, size_t incoming) override {
        return recent(group, incoming) ? oldest(group) : NONE;
    }
    bool wanted(int, size_t) override { return true; } // a free place costs nobody anything
    void used(int, size_t k, uint64_t before) override { previous_use_[k] = before; }

private:
    bool recent(int group, size_t incoming) const {
        const uint64_t before = previous_use_[incoming];
        if (before == 0) {
            return false;
        }
        int since = 0;
        for (size_t k = key(group, 0); k < key(group, options_.experts); ++k) {
            since += last_use_[k] > before && k != incoming;
        }
        return since < 2 * options_.capacity[static_cast<size_t>(group)];
    }
    std::vector<uint64_t> previous_use_;
};

} // namespace

Policy::Policy(PolicyOptions options) : options_(std::move(options)) {
    const size_t keys = static_cast<size_t>(options_.groups) * static_cast<size_t>(options_.experts);
    last_use_.assign(keys, 0);
    resident_.assign(keys, 0);
    count_.assign(options_.capacity.size(), 0);
    last_visit_.assign(static_cast<size_t>(options_.groups), 0);
}

std::unique_ptr<Policy> Policy::make(const PolicyOptions & options, std::string & error) {
    const bool global = options.kind == PolicyKind::global_lru;
    const size_t rooms = global ? 1 : static_cast<size_t>(options.groups);
    if (options.groups < 1 || options.experts < 1 || options.capacity.size() != rooms ||
        std::any_of(options.capacity.begin(), options.capacity.end(), [](int c) { return c < 0; })) {
        error = "a policy needs groups, experts and a capacity for each group";
        return nullptr;
    }
    switch (options.kind) {
    case PolicyKind::lru:
        return std::make_unique<Lru>(options);
    case PolicyKind::global_lru:
        return std::make_unique<GlobalLru>(options);
    case PolicyKind::lfu:
        return std::make_unique<Lfu>(options);
    case PolicyKind::fixed:
        if (options.frequency.size() !=
            static_cast<size_t>(options.groups) * static_cast<size_t>(options.experts)) {
            error = "the static policy needs a frequency for each expert";
            return nullptr;
        }
        return std::make_unique<Fixed>(options);
    case PolicyKind::second_touch:
        return std::make_unique<SecondTouch>(options);
    }
    error = "there is no such policy";
    return nullptr;
}

void Policy::visit(int group, const int32_t * experts, size_t count, std::vector<Placing> & misses) {
    misses.clear();
    pass_start_ = now_ + 1;
    previous_pass_start_ = last_visit_[static_cast<size_t>(group)];
    last_visit_[static_cast<size_t>(group)] = pass_start_;
    for (size_t i = 0; i < count; ++i) {
        const size_t k = key(group, experts[i]);
        const uint64_t before = last_use_[k];
        last_use_[k] = ++now_;
        used(group, k, before);
    }
    int & residents = count_[domain(group)];
    const int room = options_.capacity[domain(group)];
    for (size_t i = 0; i < count; ++i) {
        const size_t k = key(group, experts[i]);
        if (resident_[k]) {
            continue;
        }
        Placing placing;
        placing.expert = experts[i];
        if (residents < room) {
            placing.stays = wanted(group, k);
        } else if (const size_t leaving = victim(group, k); leaving != NONE) {
            placing.stays = true;
            placing.evicted_group = static_cast<int32_t>(leaving / static_cast<size_t>(options_.experts));
            placing.evicted_expert = static_cast<int32_t>(leaving % static_cast<size_t>(options_.experts));
            drop(placing.evicted_group, placing.evicted_expert);
        }
        if (placing.stays) {
            resident_[k] = 1;
            ++residents;
            came(k);
        }
        misses.push_back(placing);
    }
    visited(group);
}

void Policy::drop(int group, int expert) {
    const size_t k = key(group, expert);
    if (resident_[k]) {
        left(k);
        resident_[k] = 0;
        --count_[domain(group)];
    }
}

std::vector<int32_t> Policy::residents(int group) const {
    std::vector<int32_t> found;
    for (int expert = 0; expert < options_.experts; ++expert) {
        if (resident(group, expert)) {
            found.push_back(expert);
        }
    }
    std::sort(found.begin(), found.end(),
              [&](int32_t a, int32_t b) { return last_use_[key(group, a)] < last_use_[key(group, b)]; });
    return found;
}

size_t Policy::oldest(int group) const {
    size_t found = NONE;
    for (size_t k = key(group, 0); k < key(group, options_.experts); ++k) {
        if (resident_[k] && !in_this_pass(k) && (found == NONE || last_use_[k] < last_use_[found])) {
            found = k;
        }
    }
    return found;
}

} // namespace tt

namespace {

int64_t replay(const tt_policy * policy, const int32_t * trace, size_t length, uint64_t * hits,
               uint64_t * uses, char * error, size_t error_size) {
    const auto fail = [&](const std::string & text) {
        std::snprintf(error, error_size, "%s", text.c_str());
        return int64_t{-1};
    };
    if (policy->groups < 1 || policy->experts < 1) {
        return fail("a policy needs groups and experts");
    }
    tt::PolicyOptions options;
    options.kind = static_cast<tt::PolicyKind>(policy->kind);
    options.groups = policy->groups;
    options.experts = policy->experts;
    const bool global = options.kind == tt::PolicyKind::global_lru;
    options.capacity.assign(policy->capacity, policy->capacity + (global ? 1 : policy->groups));
    if (policy->frequency) {
        options.frequency.assign(policy->frequency,
                                 policy->frequency + static_cast<size_t>(policy->groups) *
                                                         static_cast<size_t>(policy->experts));
    }
    std::string reason;
    const std::unique_ptr<tt::Policy> replayed = tt::Policy::make(options, reason);
    if (!replayed) {
        return fail(reason);
    }
    std::vector<tt::Placing> misses;
    std::vector<int32_t> distinct;
    int64_t passes = 0;
    for (size_t at = 0; at < length; ++passes) {
        if (length - at < 3) {
            return fail("the trace ends in the middle of a record");
        }
        const int32_t group = trace[at];
        const int64_t ids = int64_t{trace[at + 1]} * trace[at + 2];
        at += 3;
        if (group < 0 || group >= options.groups || ids < 0 || static_cast<size_t>(ids) > length - at) {
            return fail("the trace holds a record that does not fit the model");
        }
        distinct.clear();
        std::vector<uint8_t> seen(static_cast<size_t>(options.experts), 0);
        for (const size_t end = at + static_cast<size_t>(ids); at < end; ++at) {
            if (trace[at] < 0 || trace[at] >= options.experts) {
                return fail("the trace names an expert that the model does not have");
            }
            uint8_t & was_seen = seen[static_cast<size_t>(trace[at])];
            if (!was_seen) {
                was_seen = 1;
                distinct.push_back(trace[at]);
            }
        }
        replayed->visit(group, distinct.data(), distinct.size(), misses);
        uses[group] += distinct.size();
        hits[group] += distinct.size() - misses.size();
    }
    return passes;
}

} // namespace

int64_t tt_policy_replay(const tt_policy * policy, const int32_t * trace, size_t length, uint64_t * hits,
                         uint64_t * uses, char * error, size_t error_size) {
    try {
        return replay(policy, trace, length, hits, uses, error, error_size);
    } catch (const std::exception &) { // no memory for so many experts: nothing may be thrown through C
        std::snprintf(error, error_size, "there is not enough memory to replay the trace");
        return -1;
    }
}
