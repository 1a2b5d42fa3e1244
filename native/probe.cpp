// C view of llama.cpp's memory breakdown, and the abort flag.

#include "ggml_api.h"
#include "tensortier.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>

namespace {

// llama_memory_breakdown_data
struct BreakdownData {
    size_t model;
    size_t context;
    size_t compute;
};

// The map is returned by value, so this plug-in and libllama must share one C++ standard library, as they do
// where both are built with the system's compiler.
using Breakdown = std::map<tt::BufferType *, BreakdownData>;
using BreakdownFunction = Breakdown (*)(const void * llama_context);

static_assert(sizeof(std::atomic<int32_t>) == sizeof(int32_t), "the flag is shared with Python as an int32");
static_assert(std::atomic<int32_t>::is_always_lock_free, "the flag is shared with Python as an int32");

} // namespace

int tt_memory_breakdown(const void * llama_context, tt_memory_row * rows, int capacity) {
    if (!tt::bound()) {
        return -1;
    }
    const tt::GgmlApi & ggml = tt::api();
    BreakdownFunction get_breakdown = nullptr;
    std::memcpy(&get_breakdown, &ggml.llama_get_memory_breakdown, sizeof(get_breakdown));
    int n = 0;
    for (const auto & [buft, data] : get_breakdown(llama_context)) {
        if (n < capacity) {
            tt_memory_row & row = rows[n];
            tt::Device * device = ggml.ggml_backend_buft_get_device(buft);
            // Pinned host buffers belong to a GPU by name but live in RAM.
            const bool in_ram = ggml.ggml_backend_buft_is_host(buft) || !device;
            std::snprintf(row.buffer_type, sizeof(row.buffer_type), "%s", ggml.ggml_backend_buft_name(buft));
            std::snprintf(row.device, sizeof(row.device), "%s",
                          in_ram ? "CPU" : ggml.ggml_backend_dev_name(device));
            row.weights = data.model;
            row.context = data.context;
            row.compute = data.compute;
        }
        ++n;
    }
    return n;
}

bool tt_should_abort(void * flag) {
    return static_cast<std::atomic<int32_t> *>(flag)->load(std::memory_order_relaxed) != 0;
}

void tt_set_flag(int32_t * flag, int32_t value) {
    reinterpret_cast<std::atomic<int32_t> *>(flag)->store(value, std::memory_order_relaxed);
}
