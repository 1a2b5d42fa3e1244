// Slots beside those of the experts that stay: for what is read ahead by a guess, and for what has left only
// just. A guess never takes a slot from an expert that stays.

#include "expert_cache.h"

#include <algorithm>

namespace tt {

// Gives slots to those experts of a pass that stay. What was read ahead, or has left only just, is in a spare
// slot, which changes places with the slot of who leaves: nothing is copied.
void ExpertCache::place_misses(Pass & pass, int group) {
    const size_t n = pass.experts.size();
    const size_t parts = groups_[static_cast<size_t>(group)].parts.size();
    GroupTotals & totals = totals_[static_cast<size_t>(group)];
    std::vector<int> & spares = spare_[static_cast<size_t>(group)];
    pass_began_ = ++now_;
    const auto put = [&](size_t i, int32_t slot) {
        pass.stays[i] = 1;
        for (size_t p = 0; p < parts; ++p) {
            pass.place[p * n + i] = slot;
        }
    };
    const auto change_places = [&](int spare, int own) {
        slots_[static_cast<size_t>(spare)].spare = false;
        slots_[static_cast<size_t>(own)].spare = true;
        slots_[static_cast<size_t>(own)].since = pass_began_ - 1; // not needed in this pass
        *std::find(spares.begin(), spares.end(), spare) = own;
    };
    const auto miss_of = [&](size_t i) {
        return std::find_if(misses_.begin(), misses_.end(),
                            [&](const Placing & placing) { return placing.expert == pass.experts[i]; });
    };
    // the slot of its own that a miss is entitled to
    const auto own_slot = [&](const Placing & placing) {
        if (placing.evicted_group < 0) {
            return take_free(group);
        }
        int32_t & left = resident_slot_[where(placing.evicted_group, placing.evicted_expert)];
        const int slot = left;
        left = UNPLACED;
        return slot;
    };
    std::vector<int32_t> & named = named_[static_cast<size_t>(group)];
    if (!named.empty()) {
        totals.guess_uses += n;
        for (const int32_t expert : pass.experts) {
            totals.guess_named += std::find(named.begin(), named.end(), expert) != named.end();
        }
        named.clear();
    }
    std::vector<size_t> absent;
    for (size_t i = 0; i < n; ++i) {
        int32_t & slot = resident_slot_[where(group, pass.experts[i])];
        const auto miss = miss_of(i);
        if (miss == misses_.end()) {
            put(i, slot);
            continue;
        }
        const int spare = spare_with(group, pass.experts[i]);
        if (spare < 0) {
            if (miss->stays) {
                absent.push_back(i);
            }
            continue;
        }
        Slot & found = slots_[static_cast<size_t>(spare)];
        totals.guess_found += found.guessed;
        totals.hits += !found.guessed && whole(found);
        found.guessed = false;
        found.since = pass_began_;
        if (miss->stays) {
            change_places(spare, own_slot(*miss));
            slot = spare;
        }
        put(i, spare);
    }
    for (const size_t i : absent) {
        int32_t & slot = resident_slot_[where(group, pass.experts[i])];
        slot = own_slot(*miss_of(i));
        const int spare = slots_[static_cast<size_t>(slot)].group < 0 ? -1 : oldest_spare(group);
        if (spare >= 0) { // who leaves now may come back sooner than who left before
            change_places(spare, slot);
            slot = spare;
        }
        settle(slot);
        Slot & filled = slots_[static_cast<size_t>(slot)];
        filled.group = group;
        filled.expert = pass.experts[i];
        filled.guessed = false;
        filled.state.fill(ReadState::none);
        put(i, slot);
    }
}

int ExpertCache::spare_with(int group, int expert) const {
    for (const int slot : spare_[static_cast<size_t>(group)]) {
        const Slot & spare = slots_[static_cast<size_t>(slot)];
        if (spare.group == group && spare.expert == expert) {
            return slot;
        }
    }
    return -1;
}

// The spare slot that has had its expert for longest, of those that the pass under way does not need; -1
// where there is none.
int ExpertCache::oldest_spare(int group) const {
    int oldest = -1;
    for (const int slot : spare_[static_cast<size_t>(group)]) {
        const Slot & spare = slots_[static_cast<size_t>(slot)];
        if (!spare.guessed && spare.since < pass_began_ && !loading(spare) &&
            (oldest < 0 || spare.since < slots_[static_cast<size_t>(oldest)].since)) {
            oldest = slot;
        }
    }
    return oldest;
}

bool ExpertCache::loading(const Slot & slot) const {
    return std::find(slot.state.begin(), slot.state.end(), ReadState::loading) != slot.state.end();
}

bool ExpertCache::whole(const Slot & slot) const {
    const size_t parts = groups_[static_cast<size_t>(slot.group)].parts.size();
    return std::all_of(slot.state.begin(), slot.state.begin() + static_cast<std::ptrdiff_t>(parts),
                       [](ReadState state) { return state == ReadState::ready; });
}

// What was read ahead and not used stays, as far as it has come; what has not begun does not begin.
void ExpertCache::give_up_wrong_guesses(int group) {
    const std::vector<PartSpec> & parts = groups_[static_cast<size_t>(group)].parts;
    for (const int slot : spare_[static_cast<size_t>(group)]) {
        Slot & spare = slots_[static_cast<size_t>(slot)];
        if (!spare.guessed) {
            continue;
        }
        spare.guessed = false;
        for (size_t p = 0; p < parts.size(); ++p) {
            if (spare.state[p] == ReadState::loading && reader_.drop(&spare.state[p])) {
                totals_[static_cast<size_t>(group)].bytes -= parts[p].nbytes;
            }
        }
    }
}

void ExpertCache::guess(int group, const std::vector<int32_t> & experts, size_t named) {
    std::vector<int32_t> & names = named_[static_cast<size_t>(group)];
    names.assign(experts.begin(), experts.begin() + static_cast<std::ptrdiff_t>(named));
    for (const int32_t expert : experts) {
        if (policy_->resident(group, expert)) {
            continue;
        }
        int slot = spare_with(group, expert);
        if (slot >= 0 && whole(slots_[static_cast<size_t>(slot)])) {
            slots_[static_cast<size_t>(slot)].since = ++now_; // others leave before it
            continue;
        }
        slot = slot >= 0 ? slot : oldest_spare(group);
        if (slot < 0) {
            return;
        }
        Slot & filled = slots_[static_cast<size_t>(slot)];
        if (loading(filled)) {
            continue; // of an earlier guess
        }
        if (filled.group != group || filled.expert != expert) {
            filled.group = group;
            filled.expert = expert;
            filled.state.fill(ReadState::none);
            // who was in it may be part of a pass that another one has interrupted
            passes_[static_cast<size_t>(group)].valid = false;
        }
        filled.guessed = true;
        filled.since = ++now_;
        ++totals_[static_cast<size_t>(group)].guess_reads;
        for (const size_t p : order_[static_cast<size_t>(group)]) {
            if (filled.state[p] != ReadState::ready) {
                read(group, static_cast<int>(p), slot, expert, true);
            }
        }
    }
}

} // namespace tt
