#include "expert_cache.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace tt {
namespace {

constexpr int WAIT_MILLISECONDS = 1000;
constexpr int SHARED_SEGMENT = 32; // slots per tensor where groups share them: a kernel's work grows with it

} // namespace

ExpertCache::ExpertCache(std::vector<GroupSpec> groups, CacheOptions options, Reader & reader)
    : groups_(std::move(groups)), options_(std::move(options)), reader_(reader), totals_(groups_.size()),
      free_(groups_.size()), named_(groups_.size()), passes_(groups_.size()) {
    for (const GroupSpec & group : groups_) {
        layouts_.push_back(lay_out(group, [this](int file) { return reader_.sector(file); }));
        order_.emplace_back(group.parts.size());
        std::iota(order_.back().begin(), order_.back().end(), size_t{0});
        most_experts_ = std::max(most_experts_, group.experts);
    }
    share_out_slots();
    PolicyOptions policy;
    policy.kind = options_.policy;
    policy.groups = static_cast<int>(groups_.size());
    policy.experts = most_experts_;
    policy.capacity = capacity_;
    policy.frequency = options_.frequency;
    std::string error;
    policy_ = Policy::make(policy, error);
    if (!policy_) {
        throw ReadError(error);
    }
    resident_slot_.assign(groups_.size() * static_cast<size_t>(most_experts_), UNPLACED);
}

void ExpertCache::share_out_slots() {
    const Shares shares = share_out(groups_, layouts_, options_);
    capacity_ = shares.capacity;
    if (global()) {
        for (int remaining = capacity_[0]; remaining > 0; remaining -= SHARED_SEGMENT) {
            add_segment(shares.largest_slot, std::min(remaining, SHARED_SEGMENT), false, 0);
        }
    } else {
        for (size_t g = 0; g < groups_.size(); ++g) {
            add_segment(layouts_[g].slot_bytes, capacity_[g], false, static_cast<int>(g));
        }
    }
    if (shares.passing > 0) {
        add_segment(shares.passing_bytes, shares.passing, true, -1);
    }
}

void ExpertCache::add_segment(size_t stride, int count, bool passing, int group) {
    const int number = static_cast<int>(segments_.size());
    segments_.push_back({nullptr, stride, count, passing});
    segment_offset_.push_back(nbytes_);
    for (int i = 0; i < count; ++i) {
        Slot slot;
        slot.segment = number;
        slot.index = i;
        slot.passing = passing;
        const int id = static_cast<int>(slots_.size());
        if (passing) {
            passing_.push_back(id);
        } else {
            free_[static_cast<size_t>(group)].push_back(id);
        }
        slots_.push_back(slot);
    }
    nbytes_ += stride * static_cast<uint64_t>(count);
}

void ExpertCache::attach(char * memory) {
    for (size_t i = 0; i < segments_.size(); ++i) {
        segments_[i].base = memory + segment_offset_[i];
    }
    for (Slot & slot : slots_) {
        const Segment & seg = segments_[static_cast<size_t>(slot.segment)];
        slot.base = seg.base + seg.stride * static_cast<size_t>(slot.index);
    }
    for (std::vector<int> & list : free_) { // first slots first
        std::reverse(list.begin(), list.end());
    }
}

int ExpertCache::capacity(int group) const {
    return capacity_[global() ? 0 : static_cast<size_t>(group)];
}

size_t ExpertCache::offset_in_slot(int group, int part, int segment) const {
    const SlotLayout & layout = layouts_[static_cast<size_t>(group)];
    const size_t p = static_cast<size_t>(part);
    return (segments_[static_cast<size_t>(segment)].passing ? 0 : layout.offset[p]) + layout.lead[p];
}

bool ExpertCache::same_pass(int group, int part, const std::vector<int32_t> & ids) const {
    const Pass & pass = passes_[static_cast<size_t>(group)];
    return pass.valid && !asked(pass, static_cast<size_t>(part)) && pass.ids == ids;
}

bool ExpertCache::asked(const Pass & pass, size_t part) const {
    return std::find(pass.asked.begin(), pass.asked.end(), part) != pass.asked.end();
}

void ExpertCache::build(Pass & pass, const std::vector<int32_t> & ids, int tokens, int used) const {
    pass.tokens = tokens;
    pass.used = used;
    pass.ids = ids;
    pass.experts.clear();
    std::vector<int32_t> index(static_cast<size_t>(most_experts_), -1);
    std::vector<size_t> counts;
    for (const int32_t expert : ids) {
        int32_t & i = index[static_cast<size_t>(expert)];
        if (i < 0) {
            i = static_cast<int32_t>(pass.experts.size());
            pass.experts.push_back(expert);
            counts.push_back(0);
        }
        ++counts[static_cast<size_t>(i)];
    }
    pass.first.assign(counts.size() + 1, 0);
    std::partial_sum(counts.begin(), counts.end(), pass.first.begin() + 1);
    pass.routed.resize(ids.size());
    std::vector<size_t> next(pass.first.begin(), pass.first.end() - 1);
    for (size_t k = 0; k < ids.size(); ++k) {
        const size_t i = static_cast<size_t>(index[static_cast<size_t>(ids[k])]);
        pass.routed[next[i]++] = {static_cast<int32_t>(k / static_cast<size_t>(used)),
                                  static_cast<int32_t>(k % static_cast<size_t>(used))};
    }
}

Pass & ExpertCache::begin(int group, int part, const std::vector<int32_t> & ids, int tokens, int used) {
    Pass & pass = passes_[static_cast<size_t>(group)];
    checked_ = false;
    if (same_pass(group, part, ids)) {
        pass.asked.push_back(static_cast<size_t>(part));
        return pass;
    }
    for (const int slot : passing_) { // what passed through before is over
        if (!slots_[static_cast<size_t>(slot)].guessed) {
            release(slot);
        }
    }
    const size_t parts = groups_[static_cast<size_t>(group)].parts.size();
    std::vector<size_t> & order = order_[static_cast<size_t>(group)];
    if (pass.asked.size() == parts) {
        order = pass.asked;
    }
    build(pass, ids, tokens, used);
    if (on_pass) {
        on_pass(group, pass);
    }
    const size_t n = pass.experts.size();
    pass.asked.assign(1, static_cast<size_t>(part));
    pass.place.assign(parts * n, UNPLACED);
    pass.stays.assign(n, 0);
    pass.valid = true;
    policy_->visit(group, pass.experts.data(), n, misses_);
    GroupTotals & totals = totals_[static_cast<size_t>(group)];
    totals.uses += n;
    totals.hits += n - misses_.size();
    ++totals.passes;

    size_t next_miss = 0;
    for (size_t i = 0; i < n; ++i) {
        const int expert = pass.experts[i];
        int32_t & slot = resident_slot_[where(group, expert)];
        if (next_miss < misses_.size() && misses_[next_miss].expert == expert) {
            const Placing & placing = misses_[next_miss++];
            if (!placing.stays) {
                continue;
            }
            if (placing.evicted_group >= 0) {
                int32_t & left = resident_slot_[where(placing.evicted_group, placing.evicted_expert)];
                slot = left;
                left = UNPLACED;
            } else {
                slot = take_free(group);
            }
            settle(slot);
            Slot & filled = slots_[static_cast<size_t>(slot)];
            filled.group = group;
            filled.expert = expert;
            filled.state.fill(ReadState::none);
        }
        pass.stays[i] = 1;
        for (size_t p = 0; p < parts; ++p) {
            pass.place[p * n + i] = slot;
        }
    }
    use_guesses(pass, group);
    // By parts: the first one is computed while the others arrive. Those resident have nothing left to read,
    // or what an error left out.
    for (const size_t p : order) {
        for (size_t i = 0; i < n; ++i) {
            const int32_t slot = pass.place[p * n + i];
            if (slot == UNPLACED) {
                continue;
            }
            const ReadState state = slots_[static_cast<size_t>(slot)].state[p];
            if (state == ReadState::none || state == ReadState::failed) {
                read(group, static_cast<int>(p), slot, pass.experts[i]);
            } else if (state == ReadState::loading) {
                reader_.promote(&slots_[static_cast<size_t>(slot)].state[p]);
            }
        }
    }
    pump(group, part);
    return pass;
}

size_t ExpertCache::warm(const std::vector<std::pair<int32_t, int32_t>> & experts,
                         const std::function<bool()> & stop) {
    size_t count = 0;
    for (const auto & [group, expert] : experts) {
        if (policy_->resident(group, expert) || free_[global() ? 0 : static_cast<size_t>(group)].empty()) {
            continue;
        }
        policy_->visit(group, &expert, 1, misses_);
        if (!misses_.front().stays) {
            continue;
        }
        const int slot = take_free(group);
        Slot & filled = slots_[static_cast<size_t>(slot)];
        filled.group = group;
        filled.expert = expert;
        resident_slot_[where(group, expert)] = slot;
        const size_t parts = groups_[static_cast<size_t>(group)].parts.size();
        for (size_t p = 0; p < parts; ++p) {
            read(group, static_cast<int>(p), slot, expert);
        }
        ++count;
    }
    reader_.finish_all(stop);
    recover(); // what failed is read again when it is used, and fails then
    return count;
}

std::vector<std::pair<int32_t, int32_t>> ExpertCache::residents() const {
    std::vector<std::pair<int32_t, int32_t>> found;
    for (int group = 0; group < static_cast<int>(groups_.size()); ++group) {
        for (const int32_t expert : policy_->residents(group)) {
            found.emplace_back(group, expert);
        }
    }
    return found;
}

void ExpertCache::pump(int group, int part) {
    Pass & pass = passes_[static_cast<size_t>(group)];
    const size_t n = pass.experts.size();
    // this part of all experts, then the parts that will be asked for next
    const std::vector<size_t> & order = order_[static_cast<size_t>(group)];
    for (auto next = std::find(order.begin(), order.end(), static_cast<size_t>(part)); next != order.end();
         ++next) {
        const size_t p = *next;
        for (size_t i = 0; i < n; ++i) {
            int32_t & place = pass.place[p * n + i];
            if (place != UNPLACED || (p != static_cast<size_t>(part) && asked(pass, p))) {
                continue;
            }
            const int slot = take_passing(group, static_cast<int>(p) == part ? part : -1);
            if (slot < 0) {
                return;
            }
            Slot & filled = slots_[static_cast<size_t>(slot)];
            filled.group = group;
            filled.expert = pass.experts[i];
            filled.state.fill(ReadState::none);
            place = slot;
            read(group, static_cast<int>(p), slot, pass.experts[i]);
        }
    }
}

// A slot for an expert that passes through, or -1 where all are taken. For the part that is computed now
// (`part` >= 0), one that only holds a later part is taken back when there is no other way on.
int ExpertCache::take_passing(int group, int part) {
    int found = idle_passing();
    for (const int slot : passing_) { // one that a wrong guess is still read into
        found = found < 0 && slots_[static_cast<size_t>(slot)].group < 0 ? slot : found;
    }
    for (const int slot : passing_) { // of a pass that another one has interrupted; a guess for the next one
        const Slot & other = slots_[static_cast<size_t>(slot)];
        found = found < 0 && (other.group != group || other.guessed) ? slot : found;
    }
    if (found >= 0) {
        give_up(found);
        return found;
    }
    if (part < 0) {
        return -1;
    }
    const Pass & pass = passes_[static_cast<size_t>(group)];
    const size_t n = pass.experts.size();
    for (size_t i = 0; i < n; ++i) { // somebody of this part is on the way: no need to hurry
        const int32_t place = pass.place[static_cast<size_t>(part) * n + i];
        if (place >= 0 && slots_[static_cast<size_t>(place)].passing) {
            return -1;
        }
    }
    give_up(passing_.back());
    return passing_.back();
}

int ExpertCache::take_free(int group) {
    std::vector<int> & list = free_[global() ? 0 : static_cast<size_t>(group)];
    const int slot = list.back(); // the policy counts them too
    list.pop_back();
    return slot;
}

// Takes a passing slot away from whoever has it.
void ExpertCache::release(int slot) {
    Slot & taken = slots_[static_cast<size_t>(slot)];
    if (taken.group < 0) {
        return;
    }
    Pass & pass = passes_[static_cast<size_t>(taken.group)];
    for (int32_t & place : pass.place) {
        if (place == slot) {
            place = UNPLACED;
        }
    }
    taken.group = -1;
    taken.expert = -1;
    taken.guessed = false;
}

void ExpertCache::read(int group, int part, int slot, int expert, bool ahead) {
    if (!checked_) { // once for all reads of a pass
        reader_.check_unchanged();
        checked_ = true;
    }
    const PartSpec & spec = groups_[static_cast<size_t>(group)].parts[static_cast<size_t>(part)];
    Slot & filled = slots_[static_cast<size_t>(slot)];
    const SlotLayout & layout = layouts_[static_cast<size_t>(group)];
    ReadRequest request;
    request.file = spec.file;
    request.offset = spec.offset + static_cast<uint64_t>(expert) * spec.nbytes;
    request.nbytes = spec.nbytes;
    request.target = filled.base + offset_in_slot(group, part, filled.segment);
    request.area = request.target - layout.lead[static_cast<size_t>(part)];
    request.state = &filled.state[static_cast<size_t>(part)];
    request.ahead = ahead;
    totals_[static_cast<size_t>(group)].bytes += spec.nbytes;
    reader_.submit(request);
}

void ExpertCache::settle(int slot) {
    for (const ReadState & state : slots_[static_cast<size_t>(slot)].state) {
        while (state == ReadState::loading) {
            reader_.wait(WAIT_MILLISECONDS);
        }
    }
}

const Slot * ExpertCache::arrived(int group, int part, size_t i) {
    const Pass & pass = passes_[static_cast<size_t>(group)];
    const int32_t place = pass.place[static_cast<size_t>(part) * pass.experts.size() + i];
    if (place < 0) {
        return nullptr;
    }
    const Slot & slot = slots_[static_cast<size_t>(place)];
    const ReadState state = slot.state[static_cast<size_t>(part)];
    if (state == ReadState::failed) {
        throw ReadError(reader_.error());
    }
    return state == ReadState::ready ? &slot : nullptr;
}

void ExpertCache::finished(int group, int part, size_t i) {
    Pass & pass = passes_[static_cast<size_t>(group)];
    int32_t & place = pass.place[static_cast<size_t>(part) * pass.experts.size() + i];
    if (place < 0 || !slots_[static_cast<size_t>(place)].passing) {
        return;
    }
    Slot & slot = slots_[static_cast<size_t>(place)]; // the next one's turn
    if (pass.stays[i]) {                              // it was read ahead: to where it stays
        Slot & own = slots_[static_cast<size_t>(resident_slot_[where(group, slot.expert)])];
        std::memcpy(own.base + offset_in_slot(group, part, own.segment),
                    slot.base + offset_in_slot(group, part, slot.segment),
                    groups_[static_cast<size_t>(group)].parts[static_cast<size_t>(part)].nbytes);
        own.state[static_cast<size_t>(part)] = ReadState::ready;
    }
    slot.group = -1;
    slot.expert = -1;
    place = FINISHED;
}

void ExpertCache::recover() {
    reader_.drain();
    for (size_t id = 0; id < slots_.size(); ++id) {
        Slot & slot = slots_[id];
        if (slot.group < 0) {
            continue;
        }
        if (slot.passing) {
            release(static_cast<int>(id));
            continue;
        }
        bool whole = true;
        for (size_t p = 0; p < groups_[static_cast<size_t>(slot.group)].parts.size(); ++p) {
            whole = whole && slot.state[p] == ReadState::ready;
        }
        if (!whole) {
            policy_->drop(slot.group, slot.expert);
            resident_slot_[where(slot.group, slot.expert)] = UNPLACED;
            free_[global() ? 0 : static_cast<size_t>(slot.group)].push_back(static_cast<int>(id));
            slot.group = -1;
            slot.expert = -1;
        }
    }
    for (Pass & pass : passes_) {
        pass.valid = false;
    }
}

} // namespace tt
