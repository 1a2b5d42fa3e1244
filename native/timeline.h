// What happened when, while a model ran: for the picture in the documentation, and for finding where time
// goes.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tt {

struct Event {
    enum class What : int32_t { read, compute, wait, pass };
    double begin = 0; // seconds, of a clock that only goes forward
    double end = 0;   // of a read: when it was noticed
    What what = What::read;
    int32_t group = -1; // pass: which
};

inline double clock_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Keeps the first events since it was started; nothing, and at no cost, before.
class Timeline {
public:
    void start(size_t capacity) {
        events_.clear();
        events_.reserve(capacity);
        capacity_ = capacity;
    }
    bool on() const { return events_.size() < capacity_; }
    void add(Event::What what, double begin, int32_t group = -1) {
        if (on()) {
            events_.push_back({begin, clock_seconds(), what, group});
        }
    }
    const std::vector<Event> & events() const { return events_; }

private:
    size_t capacity_ = 0;
    std::vector<Event> events_;
};

} // namespace tt
