#include "dense_store.h"

#include <algorithm>

namespace tt {
namespace {

constexpr int WAIT_MILLISECONDS = 1000;
// The ring, in the largest weights: one that is computed and one that arrives.
constexpr uint64_t RING_WEIGHTS = 2;
// And enough under way for a drive to be busy, where weights are small.
constexpr uint64_t RING_BYTES = 32u << 20;

} // namespace

DenseStore::DenseStore(std::vector<DenseSpec> specs, uint64_t bytes, Reader & reader) : reader_(reader) {
    for (DenseSpec & spec : specs) {
        Item item;
        item.spec = spec;
        item.area = round_up(reader_.sector_range(spec.file, spec.offset, spec.nbytes), Reader::SECTOR_MAX);
        item.stays = spec.stays;
        items_.push_back(item);
    }
    choose(bytes);
    for (size_t id = 0; id < items_.size(); ++id) {
        size_t next = (id + 1) % items_.size();
        while (next != id && items_[next].stays) {
            next = (next + 1) % items_.size();
        }
        items_[id].next = next;
    }
}

// What stays, spread evenly over the order of use, so that there is always something to compute while the
// ring fills; and where each of them lies.
void DenseStore::choose(uint64_t bytes) {
    uint64_t total = 0, largest = 0;
    for (const Item & item : items_) {
        if (!item.stays) {
            total += item.area;
            largest = std::max(largest, item.area);
        }
    }
    if (total > 0 && bytes < largest) {
        throw ReadError("the largest weight that passes through takes " + std::to_string(largest) +
                        " bytes; the room for them is only " + std::to_string(bytes));
    }
    const bool all = bytes >= total;
    const uint64_t ring =
        all ? 0 : std::min(bytes, std::max(RING_WEIGHTS * largest, std::min(RING_BYTES, bytes / 4)));
    const uint64_t stay_bytes = all ? total : bytes - ring;
    const double share = total > 0 ? static_cast<double>(stay_bytes) / static_cast<double>(total) : 0.0;
    uint64_t chosen = 0;
    double due = 0;
    for (Item & item : items_) {
        if (item.stays) {
            continue;
        }
        due += share * static_cast<double>(item.area);
        if (chosen + item.area <= stay_bytes &&
            (all || static_cast<double>(chosen) + static_cast<double>(item.area) / 2 <= due)) {
            item.stays = true;
            chosen += item.area;
        }
    }
    for (Item & item : items_) { // what rounding left over
        if (!item.stays && chosen + item.area <= stay_bytes) {
            item.stays = true;
            chosen += item.area;
        }
    }
    for (Item & item : items_) {
        if (item.stays) {
            item.at = ring_begin_;
            item.placed = true;
            ring_begin_ += item.area;
        }
    }
    nbytes_ = ring_begin_ + (all ? 0 : bytes - chosen);
    nbytes_ = nbytes_ / Reader::SECTOR_MAX * Reader::SECTOR_MAX;
}

void DenseStore::attach(char * memory) {
    memory_ = memory;
}

void DenseStore::load(const std::function<bool()> & stop) {
    for (Item & item : items_) {
        if (item.stays && item.state != ReadState::ready) {
            read(item);
        }
    }
    reader_.finish_all(stop);
    for (const Item & item : items_) {
        if (item.stays && item.state != ReadState::ready) {
            throw ReadError(reader_.error());
        }
    }
}

void DenseStore::read(Item & item) {
    ReadRequest request;
    request.file = item.spec.file;
    request.offset = item.spec.offset;
    request.nbytes = item.spec.nbytes;
    request.area = memory_ + item.at;
    request.target = request.area + reader_.lead(item.spec.file, item.spec.offset);
    request.state = &item.state;
    totals_.bytes += item.spec.nbytes;
    reader_.submit(request);
}

char * DenseStore::acquire(size_t id, bool & full) {
    Item & item = items_[id];
    full = false;
    if (!item.counted) {
        item.counted = true;
        if (item.state == ReadState::failed && !item.stays) {
            leave(id); // read ahead in vain; now that it is needed, once more
        }
        ++totals_.uses;
        totals_.hits += item.state == ReadState::ready;
        if (!item.stays) {
            if (any_asked_) {
                items_[last_asked_].next = id;
            }
            last_asked_ = id;
            any_asked_ = true;
            reader_.check_unchanged();
        }
    }
    if (item.state == ReadState::failed) {
        throw ReadError(reader_.error());
    }
    if (!item.placed) {
        while (!place(id)) {
            if (!make_room()) {
                full = true;
                return nullptr;
            }
        }
        last_read_ = id;
        read_ahead();
    }
    if (item.state != ReadState::ready) {
        return nullptr;
    }
    ++item.users;
    item.counted = false;
    return memory_ + item.at + reader_.lead(item.spec.file, item.spec.offset);
}

// Puts a weight at the ring's end and starts to read it, if there is room.
bool DenseStore::place(size_t id) {
    Item & item = items_[id];
    const uint64_t begin = ring_begin_, end = nbytes_;
    uint64_t at = begin;
    if (!ring_.empty()) {
        const Stretch & oldest = ring_.front();
        const Stretch & newest = ring_.back();
        const uint64_t head = newest.at + newest.area;
        if (newest.at >= oldest.at) { // one stretch: room behind it, else before it
            if (end - head >= item.area) {
                at = head;
            } else if (oldest.at - begin >= item.area) {
                at = begin;
            } else {
                return false;
            }
        } else if (oldest.at - head >= item.area) {
            at = head;
        } else {
            return false;
        }
    } else if (end - begin < item.area) {
        return false;
    }
    item.at = at;
    item.placed = true;
    ring_.push_back({id, at, item.area, true});
    read(item);
    return true;
}

void DenseStore::leave(size_t id) {
    Item & item = items_[id];
    while (item.state == ReadState::loading) {
        reader_.wait(WAIT_MILLISECONDS);
    }
    item.placed = false;
    item.state = ReadState::none;
    for (Stretch & stretch : ring_) {
        stretch.taken = stretch.taken && stretch.id != id;
    }
    while (!ring_.empty() && !ring_.front().taken) {
        ring_.pop_front();
    }
}

// Lets the oldest weight go although nobody has asked for it: it was read ahead in vain.
bool DenseStore::make_room() {
    if (ring_.empty() || items_[ring_.front().id].users > 0) {
        return false;
    }
    leave(ring_.front().id);
    return true;
}

void DenseStore::give_back(size_t id) {
    Item & item = items_[id];
    --item.users;
    if (item.stays || item.users > 0) {
        return;
    }
    leave(id);
    read_ahead();
}

// Reads what will be asked for next, as far as there is room.
void DenseStore::read_ahead() {
    while (true) {
        const size_t next = items_[last_read_].next;
        if (items_[next].placed || !place(next)) {
            return;
        }
        last_read_ = next;
    }
}

void DenseStore::recover() {
    reader_.drain();
    for (Item & item : items_) {
        item.users = 0;
        item.counted = false;
        if (!item.stays) {
            item.placed = false;
            item.state = ReadState::none;
        }
    }
    ring_.clear();
}

} // namespace tt
