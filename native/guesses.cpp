// What is read ahead by a guess goes into slots that nothing passes through at the moment, so that no expert
// leaves for it. A part that was guessed right is computed from there, and then copied to where it stays: by
// then others are on their way from the drive, so the copy takes nobody's time.

#include "expert_cache.h"

#include <algorithm>

namespace tt {
namespace {

constexpr int WAIT_MILLISECONDS = 1000;

} // namespace

// Puts parts that were read ahead in the place of those that would have to be read, and gives up the others.
void ExpertCache::use_guesses(Pass & pass, int group) {
    const size_t n = pass.experts.size();
    GroupTotals & totals = totals_[static_cast<size_t>(group)];
    std::vector<int32_t> & named = named_[static_cast<size_t>(group)];
    if (!named.empty()) {
        totals.guess_uses += n;
        for (const int32_t expert : pass.experts) {
            totals.guess_named += std::find(named.begin(), named.end(), expert) != named.end();
        }
        named.clear();
    }
    for (size_t i = 0; i < n; ++i) {
        bool used = false;
        for (size_t p = 0; p < groups_[static_cast<size_t>(group)].parts.size(); ++p) {
            const int guessed = guessed_slot(group, pass.experts[i], p);
            int32_t & place = pass.place[p * n + i];
            if (guessed < 0 ||
                (place >= 0 && slots_[static_cast<size_t>(place)].state[p] == ReadState::ready)) {
                continue;
            }
            slots_[static_cast<size_t>(guessed)].guessed = false;
            place = guessed;
            used = true;
        }
        totals.guess_found += used;
    }
    for (const int slot : passing_) {
        const Slot & wrong = slots_[static_cast<size_t>(slot)];
        if (wrong.guessed && wrong.group == group) {
            forget_guess(slot);
        }
    }
}

// Nobody wants what a slot was guessed to hold: what has not begun does not begin. What has goes on, and the
// slot is idle when that has ended.
void ExpertCache::forget_guess(int slot) {
    Slot & wrong = slots_[static_cast<size_t>(slot)];
    const size_t group = static_cast<size_t>(wrong.group);
    for (size_t p = 0; p < groups_[group].parts.size(); ++p) {
        if (wrong.state[p] == ReadState::loading && reader_.drop(&wrong.state[p])) {
            totals_[group].bytes -= groups_[group].parts[p].nbytes;
        }
    }
    release(slot);
}

// The slot that this part was read into ahead, or -1.
int ExpertCache::guessed_slot(int group, int expert, size_t part) const {
    for (const int slot : passing_) {
        const Slot & guessed = slots_[static_cast<size_t>(slot)];
        if (guessed.guessed && guessed.group == group && guessed.expert == expert &&
            guessed.state[part] != ReadState::none) {
            return slot;
        }
    }
    return -1;
}

// A passing slot that nobody has and nothing is read into, or -1.
int ExpertCache::idle_passing() const {
    for (const int slot : passing_) {
        if (slots_[static_cast<size_t>(slot)].group < 0 && !loading(slots_[static_cast<size_t>(slot)])) {
            return slot;
        }
    }
    return -1;
}

bool ExpertCache::loading(const Slot & slot) const {
    return std::find(slot.state.begin(), slot.state.end(), ReadState::loading) != slot.state.end();
}

// Takes a passing slot from whoever has it, as soon as nothing is read into it any more.
void ExpertCache::give_up(int slot) {
    Slot & taken = slots_[static_cast<size_t>(slot)];
    if (taken.guessed) {
        forget_guess(slot);
    }
    for (ReadState & state : taken.state) {
        reader_.promote(&state);
        while (state == ReadState::loading) {
            reader_.wait(WAIT_MILLISECONDS);
        }
    }
    release(slot);
}

void ExpertCache::guess(int group, const std::vector<int32_t> & experts, size_t named, size_t most) {
    std::vector<int32_t> & names = named_[static_cast<size_t>(group)];
    names.assign(experts.begin(), experts.begin() + static_cast<std::ptrdiff_t>(named));
    const Pass & pass = passes_[static_cast<size_t>(group)];
    if (pass.valid && pass.asked.size() < groups_[static_cast<size_t>(group)].parts.size()) {
        return; // another context is in the middle of it
    }
    for (const int slot : passing_) { // of a guess that no pass has followed
        if (slots_[static_cast<size_t>(slot)].guessed) {
            forget_guess(slot);
        }
    }
    for (const int32_t expert : experts) {
        if (policy_->resident(group, expert)) {
            continue;
        }
        if (most-- == 0) {
            return;
        }
        bool any = false;
        for (const size_t p : order_[static_cast<size_t>(group)]) {
            const int slot = idle_passing();
            if (slot < 0) {
                totals_[static_cast<size_t>(group)].guess_reads += any;
                return;
            }
            Slot & filled = slots_[static_cast<size_t>(slot)];
            filled.group = group;
            filled.expert = expert;
            filled.guessed = true;
            filled.state.fill(ReadState::none);
            read(group, static_cast<int>(p), slot, expert, true);
            any = true;
        }
        totals_[static_cast<size_t>(group)].guess_reads += any;
    }
}

} // namespace tt
