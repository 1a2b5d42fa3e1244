// The C interface to tiers, as tensortier.h describes it.

#include "backend.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <random>

namespace {

struct Handle {
    std::shared_ptr<tt::Store> store;
    std::shared_ptr<tt::PagedType> type;
};

void tell(char * error, size_t error_size, const char * text) {
    if (error_size > 0) {
        std::snprintf(error, error_size, "%s", text);
    }
}

Handle & handle(void * tier) {
    return *static_cast<Handle *>(tier);
}

// Runs a function; 0, or 1 with what it threw in `error`.
template <typename Function> int guarded(char * error, size_t error_size, Function function) {
    tell(error, error_size, "");
    try {
        if (!tt::bound()) {
            throw tt::ReadError("the plug-in is not bound to llama.cpp");
        }
        function();
        return 0;
    } catch (const std::bad_alloc &) {
        tell(error, error_size, "not enough memory for the weights to be kept in RAM");
    } catch (const std::exception & exception) {
        tell(error, error_size, exception.what());
    }
    return 1;
}

std::function<bool()> asking(tt_tier_stop stop) {
    return [stop] { return stop && stop() != 0; };
}

} // namespace

void * tt_tier_open(const tt_tier_config * config, char * error, size_t error_size) {
    void * opened = nullptr;
    guarded(error, error_size, [&] {
        auto made = std::make_unique<Handle>();
        made->store = std::make_shared<tt::Store>(*config);
        made->type = tt::make_paged_type(made->store);
        opened = made.release();
    });
    return opened;
}

void * tt_tier_buffer_type(void * tier) {
    return &handle(tier).type->type;
}

void * tt_tier_planned_buffer_type(char * error, size_t error_size) {
    tt::PagedType * planned = nullptr;
    guarded(error, error_size, [&] {
        static const std::shared_ptr<tt::PagedType> only = tt::make_paged_type(nullptr);
        planned = only.get();
    });
    return planned ? &planned->type : nullptr;
}

int tt_tier_loaded(void * tier, tt_tier_stop stop, char * error, size_t error_size) {
    return guarded(error, error_size, [&] { handle(tier).store->loaded(asking(stop)); });
}

int64_t tt_tier_warm(void * tier, const int32_t * pairs, int64_t count, tt_tier_stop stop, char * error,
                     size_t error_size) {
    int64_t read = -1;
    guarded(error, error_size, [&] {
        tt::Store & store = *handle(tier).store;
        const std::lock_guard<std::mutex> lock(store.mutex);
        read = static_cast<int64_t>(store.warm(pairs, static_cast<size_t>(count), asking(stop)));
    });
    return read;
}

int64_t tt_tier_residents(void * tier, int32_t * pairs, int64_t capacity) {
    tt::Store & store = *handle(tier).store;
    const std::lock_guard<std::mutex> lock(store.mutex);
    if (!store.experts()) {
        return 0;
    }
    try {
        const auto residents = store.experts()->residents();
        for (size_t i = 0; i < residents.size() && static_cast<int64_t>(i) < capacity; ++i) {
            pairs[2 * i] = residents[i].first;
            pairs[2 * i + 1] = residents[i].second;
        }
        return static_cast<int64_t>(residents.size());
    } catch (const std::bad_alloc &) {
        return 0; // a warm start is worth no error
    }
}

int32_t tt_tier_capacities(const tt_tier_config * config, uint64_t sector, int32_t * capacities, int32_t size,
                           char * error, size_t error_size) {
    int32_t count = -1;
    tell(error, error_size, "");
    try {
        const std::vector<int> found = tt::capacities(*config, sector);
        count = static_cast<int32_t>(found.size());
        std::copy_n(found.begin(), std::min(count, size), capacities);
    } catch (const std::exception & exception) {
        tell(error, error_size, exception.what());
    }
    return count;
}

void tt_tier_error(void * tier, char * error, size_t error_size) {
    tt::Store & store = *handle(tier).store;
    const std::lock_guard<std::mutex> lock(store.mutex);
    tell(error, error_size, store.take_error().c_str());
}

void tt_tier_stats_get(void * tier, tt_tier_stats * stats) {
    tt::Store & store = *handle(tier).store;
    const std::lock_guard<std::mutex> lock(store.mutex);
    store.stats(*stats);
}

int tt_tier_group_stats_get(void * tier, tt_tier_group_stats * rows, int capacity) {
    tt::Store & store = *handle(tier).store;
    const std::lock_guard<std::mutex> lock(store.mutex);
    if (!store.experts()) {
        return 0;
    }
    const int groups = static_cast<int>(store.experts()->groups());
    for (int group = 0; group < groups && group < capacity; ++group) {
        const tt::GroupTotals & totals = store.experts()->totals(group);
        rows[group] = {totals.passes,        totals.uses,
                       totals.hits,          totals.bytes,
                       totals.guess_uses,    totals.guess_named,
                       totals.guess_reads,   totals.guess_found,
                       totals.stall_seconds, store.experts()->capacity(group)};
    }
    return groups;
}

int tt_tier_trace(void * tier, const char * path, char * error, size_t error_size) {
    return guarded(error, error_size, [&] {
        tt::Store & store = *handle(tier).store;
        const std::lock_guard<std::mutex> lock(store.mutex);
        store.trace(path);
    });
}

void tt_tier_timeline(void * tier, int64_t capacity) {
    tt::Store & store = *handle(tier).store;
    const std::lock_guard<std::mutex> lock(store.mutex);
    store.reader().timeline.start(static_cast<size_t>(std::max<int64_t>(capacity, 0)));
}

int64_t tt_tier_timeline_get(void * tier, tt_tier_event * events, int64_t capacity) {
    tt::Store & store = *handle(tier).store;
    const std::lock_guard<std::mutex> lock(store.mutex);
    const std::vector<tt::Event> & kept = store.reader().timeline.events();
    for (size_t i = 0; i < kept.size() && static_cast<int64_t>(i) < capacity; ++i) {
        events[i] = {kept[i].begin, kept[i].end, static_cast<int32_t>(kept[i].what), kept[i].group};
    }
    return static_cast<int64_t>(kept.size());
}

void tt_tier_inject(void * tier, int64_t result, int64_t after, int64_t count) {
    tt::Store & store = *handle(tier).store;
    const std::lock_guard<std::mutex> lock(store.mutex);
    store.reader().inject(result, after, count);
}

void tt_tier_hold(void * tier, uint64_t order) {
    tt::Store & store = *handle(tier).store;
    const std::lock_guard<std::mutex> lock(store.mutex);
    store.reader().hold(order);
}

int64_t tt_reads_misused(void) {
    return tt::reads_misused();
}

void tt_tier_close(void * tier) {
    delete &handle(tier);
}

double tt_bench_reads(const char * path, uint64_t file_size, int32_t reader, int32_t depth, uint64_t block,
                      double seconds, char * error, size_t error_size) {
    double rate = -1;
    guarded(error, error_size, [&] {
        tt::ReaderOptions options;
        options.files = {path};
        options.file_sizes = {file_size};
        options.method = reader;
        options.queue_depth = std::max(depth, 1);
        options.piece = block;
        const uint64_t blocks = file_size / std::max<uint64_t>(block, 1);
        if (blocks == 0) {
            throw tt::ReadError(std::string(path) + " is smaller than one block");
        }
        const size_t slots = static_cast<size_t>(options.queue_depth);
        const uint64_t stride =
            (block + 2 * tt::Reader::SECTOR_MAX) / tt::Reader::SECTOR_MAX * tt::Reader::SECTOR_MAX;
        const tt::Memory memory(stride * slots, true);
        std::vector<tt::ReadState> states(slots, tt::ReadState::none);
        tt::Reader reads(std::move(options)); // after the memory: it goes first
        std::mt19937_64 random(1);
        const auto start = std::chrono::steady_clock::now();
        double passed = 0;
        while (passed < seconds) {
            for (size_t i = 0; i < slots; ++i) {
                if (states[i] == tt::ReadState::failed) {
                    throw tt::ReadError(reads.error());
                }
                if (states[i] != tt::ReadState::loading) {
                    const uint64_t offset = random() % blocks * block;
                    char * area = memory.data() + stride * i;
                    reads.submit({0, offset, block, area, area + reads.lead(0, offset), &states[i]});
                }
            }
            reads.wait(100);
            passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        }
        reads.drain();
        rate = static_cast<double>(reads.totals().bytes) / reads.totals().busy_seconds;
    });
    return rate;
}
