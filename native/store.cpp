#include "store.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <sys/mman.h>
#endif

namespace tt {

#if defined(_WIN32)

namespace {

// The names that we are given are UTF-8; std::fopen takes those of the system's old code page.
std::FILE * open_to_write(const char * path) {
    const int length = MultiByteToWideChar(CP_UTF8, 0, path, -1, nullptr, 0);
    std::wstring wide(static_cast<size_t>(std::max(length, 1)), L'\0');
    MultiByteToWideChar(CP_UTF8, 0, path, -1, wide.data(), length);
    return _wfopen(wide.c_str(), L"wb");
}

} // namespace

Memory::Memory(uint64_t nbytes, bool committed) : nbytes_(nbytes) {
    const DWORD how = committed ? MEM_RESERVE | MEM_COMMIT : MEM_RESERVE;
    data_ =
        static_cast<char *>(VirtualAlloc(nullptr, nbytes, how, committed ? PAGE_READWRITE : PAGE_NOACCESS));
    if (!data_) {
        throw std::bad_alloc();
    }
    if (committed) {
        std::memset(data_, 0, nbytes);
        locked_ = VirtualLock(data_, nbytes) != 0;
    }
}

Memory::~Memory() {
    VirtualFree(data_, 0, MEM_RELEASE);
}

#else

namespace {

std::FILE * open_to_write(const char * path) {
    return std::fopen(path, "wb");
}

} // namespace

Memory::Memory(uint64_t nbytes, bool committed) : nbytes_(nbytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
    flags |= committed ? 0 : MAP_NORESERVE;
#endif
    void * memory = mmap(nullptr, nbytes, committed ? PROT_READ | PROT_WRITE : PROT_NONE, flags, -1, 0);
    if (memory == MAP_FAILED) {
        throw std::bad_alloc();
    }
    data_ = static_cast<char *>(memory);
    if (committed) {
#if defined(MADV_HUGEPAGE)
        madvise(memory, nbytes, MADV_HUGEPAGE); // fewer pages to look up and to pin for each read
#endif
        locked_ = mlock(memory, nbytes) == 0;
        if (!locked_) { // not allowed to: then at least every page is there before the first token
            std::memset(memory, 0, nbytes);
        }
    }
}

Memory::~Memory() {
    munmap(data_, nbytes_);
}

#endif

namespace {

// Experts read ahead where nothing else is said: as many as there is room for beside what passes through, of
// the sizes that models have; more were no faster.
constexpr int GUESSES = 4;

// Gathers the tensors of a configuration into groups of experts and a list of the others.
struct Sorted {
    std::vector<GroupSpec> groups;
    std::vector<DenseSpec> dense;
};

Sorted sort_tensors(const tt_tier_config & config, std::vector<Weight> & weights) {
    Sorted sorted;
    sorted.groups.resize(static_cast<size_t>(config.n_groups));
    for (int32_t i = 0; i < config.n_tensors; ++i) {
        const tt_tier_tensor & tensor = config.tensors[i];
        Weight & weight = weights[static_cast<size_t>(i)];
        weight.file = tensor.file;
        weight.offset = tensor.offset;
        weight.nbytes = tensor.nbytes;
        if (tensor.file < 0 || tensor.file >= config.n_files) {
            throw ReadError(std::string("no such file for ") + tensor.name);
        }
        if (tensor.kind != 1) {
            weight.dense = sorted.dense.size();
            sorted.dense.push_back({tensor.file, tensor.offset, tensor.nbytes, tensor.kind == 2});
            continue;
        }
        if (tensor.group < 0 || tensor.group >= config.n_groups || tensor.part < 0 ||
            static_cast<size_t>(tensor.part) >= MAX_PARTS || tensor.experts < 1 ||
            tensor.nbytes % static_cast<uint64_t>(tensor.experts) != 0) {
            throw ReadError(std::string("not a tensor of experts: ") + tensor.name);
        }
        weight.kind = Weight::Kind::expert;
        weight.group = tensor.group;
        weight.part = tensor.part;
        GroupSpec & group = sorted.groups[static_cast<size_t>(tensor.group)];
        if (group.experts != 0 && group.experts != tensor.experts) {
            throw ReadError(std::string("another number of experts than its layer: ") + tensor.name);
        }
        group.experts = tensor.experts;
        if (group.parts.size() <= static_cast<size_t>(tensor.part)) {
            group.parts.resize(static_cast<size_t>(tensor.part) + 1);
        }
        group.parts[static_cast<size_t>(tensor.part)] = {
            tensor.file, tensor.offset, tensor.nbytes / static_cast<uint64_t>(tensor.experts)};
    }
    for (const GroupSpec & group : sorted.groups) {
        for (const PartSpec & part : group.parts) {
            if (part.nbytes == 0) {
                throw ReadError("a layer lacks a part of its experts");
            }
        }
        if (group.parts.empty()) {
            throw ReadError("a layer lacks its experts");
        }
    }
    return sorted;
}

CacheOptions cache_options(const tt_tier_config & config, const std::vector<GroupSpec> & groups) {
    CacheOptions cache;
    cache.policy = static_cast<PolicyKind>(config.policy);
    cache.bytes = config.expert_bytes;
    cache.used = std::max(config.used, 1);
    if (config.frequency) {
        int most = 0;
        for (const GroupSpec & group : groups) {
            most = std::max(most, group.experts);
        }
        cache.frequency.assign(config.frequency,
                               config.frequency + groups.size() * static_cast<size_t>(most));
    }
    return cache;
}

} // namespace

std::vector<int> capacities(const tt_tier_config & config, uint64_t sector) {
    std::vector<Weight> weights(static_cast<size_t>(config.n_tensors));
    const Sorted sorted = sort_tensors(config, weights);
    if (sorted.groups.empty()) {
        return {};
    }
    std::vector<SlotLayout> layouts;
    for (const GroupSpec & group : sorted.groups) {
        layouts.push_back(lay_out(group, [sector](int) { return sector; }));
    }
    return share_out(sorted.groups, layouts, cache_options(config, sorted.groups)).capacity;
}

Store::Store(const tt_tier_config & config) : weights_(static_cast<size_t>(config.n_tensors)) {
    Sorted sorted = sort_tensors(config, weights_);
    for (int32_t i = 0; i < config.n_tensors; ++i) {
        Weight & weight = weights_[static_cast<size_t>(i)];
        weight.store = this;
        by_name_[config.tensors[i].name] = &weight;
    }
    ReaderOptions reading;
    reading.files.assign(config.files, config.files + config.n_files);
    reading.file_sizes.assign(config.file_sizes, config.file_sizes + config.n_files);
    reading.method = config.reader;
    reading.queue_depth = std::clamp(config.queue_depth, 1, 1024);
    reading.piece = std::max<uint64_t>(config.read_bytes, Reader::SECTOR_MAX);
    reading.ahead_depth = std::max(reading.queue_depth / 2, 1);
    reader_ = std::make_unique<Reader>(std::move(reading));
    uint64_t nbytes = 0;
    if (!sorted.groups.empty()) {
        CacheOptions cache = cache_options(config, sorted.groups);
        used_ = static_cast<size_t>(cache.used);
        guesses_ = static_cast<size_t>(config.guesses >= 0 ? config.guesses : std::min(cache.used, GUESSES));
        always_guess_ = config.guesses > 0;
        routers.resize(guesses_ > 0 ? sorted.groups.size() : 0);
        experts_ = std::make_unique<ExpertCache>(std::move(sorted.groups), std::move(cache), *reader_);
        experts_->on_pass = [this](int group, const Pass & pass) {
            write_trace(group, pass);
            time(group, pass);
            reader_->timeline.add(Event::What::pass, clock_seconds(), group);
        };
        nbytes += (experts_->nbytes() + Reader::SECTOR_MAX - 1) / Reader::SECTOR_MAX * Reader::SECTOR_MAX;
    }
    const uint64_t dense_at = nbytes;
    if (!sorted.dense.empty()) {
        dense_ = std::make_unique<DenseStore>(std::move(sorted.dense), config.dense_bytes, *reader_);
        nbytes += dense_->nbytes();
    }
    memory_ = std::make_unique<Memory>(std::max<uint64_t>(nbytes, Reader::SECTOR_MAX), true);
    if (experts_) {
        experts_->attach(memory_->data());
    }
    if (dense_) {
        dense_->attach(memory_->data() + dense_at);
    }
}

Store::~Store() {
    reader_.reset(); // before the memory it reads into
    if (trace_) {
        std::fclose(trace_);
    }
}

Weight * Store::find(const char * name) {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? nullptr : found->second;
}

void Store::hide(Weight & weight, Tensor * tensor) {
    weight.tensor = tensor;
    std::copy(tensor->ne, tensor->ne + MAX_DIMS, weight.shape);
    tensor->extra = &weight;
    tensor->ne[0] = 0;
    hidden_.push_back(&weight);
}

void Store::loaded(const std::function<bool()> & stop) {
    for (Weight * weight : hidden_) {
        std::copy(weight->shape, weight->shape + MAX_DIMS, weight->tensor->ne);
    }
    hidden_.clear();
    const std::lock_guard<std::mutex> lock(mutex);
    if (dense_) {
        dense_->load(stop);
    }
}

size_t Store::warm(const int32_t * pairs, size_t count, const std::function<bool()> & stop) {
    if (!experts_) {
        return 0;
    }
    std::vector<std::pair<int32_t, int32_t>> wanted;
    for (size_t i = 0; i < count; ++i) {
        const int32_t group = pairs[2 * i], expert = pairs[2 * i + 1];
        if (experts_->has(group, expert)) {
            wanted.emplace_back(group, expert);
        }
    }
    return experts_->warm(wanted, stop);
}

void Store::forget_tensors() {
    hidden_.clear();
    routers.assign(routers.size(), Router{});
}

void Store::read_weight(const Weight & weight, uint64_t offset, uint64_t nbytes, void * target) {
    reader_->read_now(weight.file, weight.offset + offset, nbytes, target);
}

void Store::failed(const std::string & reason) {
    error_ = reason;
    if (experts_) {
        experts_->recover();
    }
    if (dense_) {
        dense_->recover();
    }
}

std::string Store::take_error() {
    std::string error;
    error.swap(error_);
    return error;
}

void Store::trace(const char * path) {
    if (trace_) {
        const bool fine = std::fclose(trace_) == 0;
        trace_ = nullptr;
        if (!fine) {
            throw ReadError("cannot write " + trace_path_ + ": " + std::strerror(errno));
        }
    }
    if (path) {
        trace_ = open_to_write(path);
        if (!trace_) {
            throw ReadError(std::string("cannot write ") + path + ": " + std::strerror(errno));
        }
        trace_path_ = path;
    }
}

// Tokens one after another are what the trial of guesses compares.
void Store::time(int group, const Pass & pass) {
    if (pass.tokens != 1) {
        trial_.interrupted();
    } else if (group == 0) {
        trial_.token(clock_seconds());
    }
}

void Store::write_trace(int group, const Pass & pass) {
    if (!trace_) {
        return;
    }
    const int32_t head[3] = {group, pass.tokens, pass.used};
    if (std::fwrite(head, sizeof(head), 1, trace_) != 1 ||
        std::fwrite(pass.ids.data(), sizeof(int32_t), pass.ids.size(), trace_) != pass.ids.size()) {
        throw ReadError("cannot write " + trace_path_ + ": " + std::strerror(errno));
    }
}

char * Store::rows(uint64_t nbytes) {
    if (!rows_ || rows_->nbytes() < nbytes) {
        rows_.reset(); // first: there may be no room for both
        rows_ = std::make_unique<Memory>(nbytes, true);
    }
    return rows_->data();
}

void Store::stats(tt_tier_stats & stats) const {
    stats = tt_tier_stats{};
    stats.memory_bytes = memory_->nbytes();
    stats.scratch_bytes = (rows_ ? rows_->nbytes() : 0) + scratch_beside_;
    if (experts_) {
        stats.expert_slots = static_cast<uint64_t>(experts_->own_slots());
        stats.passing_slots = static_cast<uint64_t>(experts_->passing_slots());
    }
    if (dense_) {
        stats.resident_bytes = dense_->resident_bytes();
        stats.ring_bytes = dense_->ring_bytes();
        stats.dense_uses = dense_->totals().uses;
        stats.dense_hits = dense_->totals().hits;
        stats.dense_bytes = dense_->totals().bytes;
        stats.dense_stall_seconds = dense_->totals().stall_seconds;
    }
    stats.drive_bytes = reader_->totals().bytes;
    stats.drive_reads = reader_->totals().pieces;
    stats.drive_busy_seconds = reader_->totals().busy_seconds;
    stats.direct = reader_->direct() ? 1 : 0;
    stats.locked = memory_->locked() ? 1 : 0;
    stats.guessing = guessing() ? 1 : 0;
    std::snprintf(stats.reader, sizeof(stats.reader), "%s", reader_->method());
}

} // namespace tt
