// Microbenchmarks: how fast this machine computes the operations that a token's time is made of, with the
// very kernels and backends that a model will run on.

#include "ggml_api.h"
#include "tensortier.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using tt::api;

template <auto Free> struct Deleter {
    template <typename T> void operator()(T * pointer) const { (api().*Free)(pointer); }
};
using ContextPtr = std::unique_ptr<tt::Context, Deleter<&tt::GgmlApi::ggml_free>>;
using BufferPtr = std::unique_ptr<tt::Buffer, Deleter<&tt::GgmlApi::ggml_backend_buffer_free>>;
using BackendPtr = std::unique_ptr<tt::Backend, Deleter<&tt::GgmlApi::ggml_backend_free>>;

constexpr int TYPE_F32 = 0;
constexpr int TYPE_F16 = 1;
constexpr int TYPE_I32 = 26;

// Small reproducible numbers in [-0.5, 0.5): random bits could be denormals or NaN, which some kernels take
// longer for than for any weight.
class Noise {
public:
    float next() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<float>(state_ >> 40) / 16777216.0f - 0.5f;
    }

private:
    uint64_t state_ = 42;
};

ContextPtr make_context(size_t tensors, size_t graph_nodes) {
    const size_t graph = graph_nodes ? api().ggml_graph_overhead_custom(graph_nodes, false) : 0;
    return ContextPtr(api().ggml_init({api().ggml_tensor_overhead() * (tensors + 8) + graph, nullptr, true}));
}

// Quantized noise for a tensor: a few rows are made and laid over all of it. Empty where ggml does not
// quantize to its type.
std::vector<char> noise_for(const tt::Tensor * tensor) {
    const int64_t width = tensor->ne[0];
    const int64_t rows = tensor->ne[1] * tensor->ne[2] * tensor->ne[3];
    const int64_t made = rows < 16 ? rows : 16;
    Noise noise;
    std::vector<float> values(static_cast<size_t>(width * made));
    for (float & value : values) {
        value = noise.next();
    }
    const size_t row_bytes = api().ggml_row_size(tensor->type, width);
    std::vector<char> bytes(row_bytes * static_cast<size_t>(made));
    if (tensor->type == TYPE_F32) {
        std::memcpy(bytes.data(), values.data(), bytes.size());
    } else {
        const std::vector<float> importance(static_cast<size_t>(width), 1.0f);
        if (api().ggml_quantize_chunk(tensor->type, values.data(), bytes.data(), 0, made, width,
                                      importance.data()) != bytes.size()) {
            return {};
        }
    }
    // Whole tensors at once: buffers that reorder weights accept no parts.
    std::vector<char> all(api().ggml_nbytes(tensor));
    for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(all.data() + static_cast<size_t>(row) * row_bytes,
                    bytes.data() + static_cast<size_t>(row % made) * row_bytes, row_bytes);
    }
    return all;
}

bool fill(tt::Tensor * tensor) {
    const std::vector<char> all = noise_for(tensor);
    if (!all.empty()) {
        api().ggml_backend_tensor_set(tensor, all.data(), 0, all.size());
    }
    return !all.empty();
}

// The buffer type in which the CPU backend reorders weights, if it has one for this product.
tt::BufferType * repacking_type(tt::Device * device, tt::Tensor * product) {
    using GetExtra = tt::BufferType ** (*)(tt::Device *);
    void * symbol = api().ggml_backend_reg_get_proc_address(api().ggml_backend_dev_backend_reg(device),
                                                            "ggml_backend_dev_get_extra_bufts");
    GetExtra get_extra = nullptr;
    std::memcpy(&get_extra, &symbol, sizeof(symbol));
    if (!get_extra) {
        return nullptr;
    }
    tt::Tensor * weight = product->src[0];
    for (tt::BufferType ** type = get_extra(device); type && *type; ++type) {
        // supports_op looks at the weight's buffer, so give it an empty one for the question, as llama.cpp
        // does
        const BufferPtr empty(api().ggml_backend_buft_alloc_buffer(*type, 0));
        if (!empty) {
            continue;
        }
        weight->buffer = empty.get();
        const bool supported = api().ggml_backend_dev_supports_op(device, product);
        weight->buffer = nullptr;
        if (supported) {
            return *type;
        }
    }
    return nullptr;
}

int fail(char * error, size_t error_size, const std::string & text) {
    std::snprintf(error, error_size, "%s", text.c_str());
    return -1;
}

// Memory for all tensors of a context; null, with the reason in `error`, where there is too little.
BufferPtr allocate(const ContextPtr & context, tt::BufferType * buft, char * error, size_t error_size) {
    BufferPtr buffer(api().ggml_backend_alloc_ctx_tensors_from_buft(context.get(), buft));
    if (!buffer) {
        fail(error, error_size, std::string("not enough memory on ") + api().ggml_backend_buft_name(buft));
    }
    return buffer;
}

// Threads that slept take some time to run at full speed again, on a virtual machine longer than a small
// graph.
constexpr double WARM_UP_SECONDS = 0.03;

// Runs a graph to warm up, at least once, and then `capacity` times. A value of the result is read each time:
// a remote server accepts a graph before it computes it, and says so only when something is asked of it.
int time_graph(tt::Backend * backend, tt::Graph * graph, double * seconds, int capacity, char * error,
               size_t error_size) {
    double warm = 0.0;
    for (int run = -1; run < capacity; ++run) {
        const auto start = std::chrono::steady_clock::now();
        if (api().ggml_backend_graph_compute(backend, graph) != 0) {
            return fail(error, error_size, "the backend failed to compute");
        }
        api().ggml_backend_synchronize(backend);
        float value = 0.0f;
        api().ggml_backend_tensor_get(api().ggml_graph_node(graph, -1), &value, 0, sizeof(value));
        const double taken = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (run >= 0) {
            seconds[run] = taken;
        } else if ((warm += taken) < WARM_UP_SECONDS) {
            --run;
        }
    }
    return capacity;
}

// A backend on the named device; null, with the reason in `error`, where there is none.
BackendPtr start_backend(const char * name, int threads, char * error, size_t error_size) {
    if (!tt::bound()) {
        fail(error, error_size, "the plug-in is not bound to llama.cpp");
        return nullptr;
    }
    tt::Device * device = api().ggml_backend_dev_by_name(name);
    if (!device) {
        fail(error, error_size, std::string("there is no device ") + name);
        return nullptr;
    }
    BackendPtr backend(api().ggml_backend_dev_init(device, nullptr));
    using SetThreads = void (*)(tt::Backend *, int);
    void * symbol = api().ggml_backend_reg_get_proc_address(api().ggml_backend_dev_backend_reg(device),
                                                            "ggml_backend_set_n_threads");
    SetThreads set_threads = nullptr;
    std::memcpy(&set_threads, &symbol, sizeof(symbol));
    if (!backend) {
        fail(error, error_size, std::string("the device does not start: ") + name);
    } else if (set_threads) {
        set_threads(backend.get(), threads);
    }
    return backend;
}

} // namespace

int tt_bench_mul_mat(const tt_mul_mat_bench * bench, double * seconds, int capacity, char * error,
                     size_t error_size) {
    const BackendPtr backend = start_backend(bench->device, bench->threads, error, error_size);
    if (!backend) {
        return -1;
    }
    tt::Device * device = api().ggml_backend_get_device(backend.get());
    const size_t count = static_cast<size_t>(bench->count);
    const ContextPtr weights = make_context(count, 0);
    const ContextPtr compute = make_context(count + 2, count + 8);
    tt::Graph * graph = api().ggml_new_graph_custom(compute.get(), count + 8, false);

    tt::Tensor * input = nullptr;
    tt::Tensor * ids = nullptr;
    if (bench->experts > 0) {
        input = api().ggml_new_tensor_3d(compute.get(), TYPE_F32, bench->k, 1, bench->batch);
        ids = api().ggml_new_tensor_2d(compute.get(), TYPE_I32, bench->used, bench->batch);
    } else {
        input = api().ggml_new_tensor_2d(compute.get(), TYPE_F32, bench->k, bench->batch);
    }
    tt::Tensor * product = nullptr;
    for (size_t i = 0; i < count; ++i) {
        tt::Tensor * weight = api().ggml_new_tensor_3d(weights.get(), bench->type, bench->k, bench->n,
                                                       bench->experts > 0 ? bench->experts : 1);
        product = ids ? api().ggml_mul_mat_id(compute.get(), weight, input, ids)
                      : api().ggml_mul_mat(compute.get(), weight, input);
        api().ggml_build_forward_expand(graph, product);
    }
    tt::BufferType * buft = api().ggml_backend_dev_buffer_type(device);
    if (bench->repack) {
        buft = repacking_type(device, product);
        if (!buft) {
            return 0; // not an error: there is no such kernel for this type
        }
    } else if (!api().ggml_backend_dev_supports_op(device, product)) {
        return 0;
    }
    const BufferPtr weight_buffer = allocate(weights, buft, error, error_size);
    const BufferPtr compute_buffer =
        allocate(compute, api().ggml_backend_dev_buffer_type(device), error, error_size);
    if (!weight_buffer || !compute_buffer) {
        return -1;
    }
    // weights count as such for the backends that treat them apart
    api().ggml_backend_buffer_set_usage(weight_buffer.get(), 1);
    const std::vector<char> noise = noise_for(product->src[0]); // the same for all
    if (noise.empty()) {
        return fail(error, error_size, "ggml does not quantize to this type");
    }
    for (size_t i = 0; i < count; ++i) {
        tt::Tensor * weight = api().ggml_graph_node(graph, static_cast<int>(i))->src[0];
        api().ggml_backend_tensor_set(weight, noise.data(), 0, noise.size());
    }
    if (!fill(input)) {
        return fail(error, error_size, "the input could not be filled");
    }
    if (ids) {
        // spread over the experts, each token another set, no expert twice in one token
        std::vector<int32_t> chosen(static_cast<size_t>(bench->used * bench->batch));
        for (size_t i = 0; i < chosen.size(); ++i) {
            const size_t token = i / static_cast<size_t>(bench->used);
            const size_t slot = i % static_cast<size_t>(bench->used);
            chosen[i] = static_cast<int32_t>((token * 7 + slot * 3) % static_cast<size_t>(bench->experts));
        }
        api().ggml_backend_tensor_set(ids, chosen.data(), 0, chosen.size() * sizeof(int32_t));
    }
    return time_graph(backend.get(), graph, seconds, capacity, error, error_size);
}

int tt_bench_attention(const tt_attention_bench * bench, double * seconds, int capacity, char * error,
                       size_t error_size) {
    const BackendPtr backend = start_backend(bench->device, bench->threads, error, error_size);
    if (!backend) {
        return -1;
    }
    tt::Device * device = api().ggml_backend_get_device(backend.get());
    const size_t count = static_cast<size_t>(bench->count);
    const size_t nodes = count * 3 + 8; // two permuted views and the attention itself
    const ContextPtr compute = make_context(count * 5 + 2, nodes);
    tt::Graph * graph = api().ggml_new_graph_custom(compute.get(), nodes, false);
    tt::Tensor * query =
        api().ggml_new_tensor_3d(compute.get(), TYPE_F32, bench->head_dim, bench->batch, bench->heads);
    tt::Tensor * mask = api().ggml_new_tensor_2d(compute.get(), TYPE_F16, bench->cells, bench->batch);
    tt::Tensor * product = nullptr;
    std::vector<tt::Tensor *> caches;
    for (size_t i = 0; i < count; ++i) {
        tt::Tensor * pair[2]; // keys, values
        // as llama.cpp keeps them: all heads of a cell side by side
        for (tt::Tensor *& cache : pair) {
            caches.push_back(api().ggml_new_tensor_3d(compute.get(), bench->type, bench->head_dim,
                                                      bench->kv_heads, bench->cells));
            cache = api().ggml_permute(compute.get(), caches.back(), 0, 2, 1, 3);
        }
        product = api().ggml_flash_attn_ext(compute.get(), query, pair[0], pair[1], mask, 0.1f, 0.0f, 0.0f);
        api().ggml_build_forward_expand(graph, product);
    }
    if (!api().ggml_backend_dev_supports_op(device, product)) {
        return 0;
    }
    const BufferPtr buffer = allocate(compute, api().ggml_backend_dev_buffer_type(device), error, error_size);
    if (!buffer) {
        return -1;
    }
    for (tt::Tensor * cache : caches) {
        if (!fill(cache)) {
            return fail(error, error_size, "ggml does not quantize to this type");
        }
    }
    fill(query);
    const std::vector<uint16_t> open(static_cast<size_t>(bench->cells * bench->batch),
                                     0); // 0: nothing masked
    api().ggml_backend_tensor_set(mask, open.data(), 0, open.size() * sizeof(uint16_t));
    return time_graph(backend.get(), graph, seconds, capacity, error, error_size);
}

int tt_bench_small_ops(const tt_small_ops_bench * bench, double * seconds, int capacity, char * error,
                       size_t error_size) {
    const BackendPtr backend = start_backend(bench->device, bench->threads, error, error_size);
    if (!backend) {
        return -1;
    }
    tt::Device * device = api().ggml_backend_get_device(backend.get());
    const size_t count = static_cast<size_t>(bench->count);
    const ContextPtr compute = make_context(count + 2, count + 8);
    tt::Graph * graph = api().ggml_new_graph_custom(compute.get(), count + 8, false);
    tt::Tensor * input = api().ggml_new_tensor_2d(compute.get(), TYPE_F32, bench->width, bench->rows);
    tt::Tensor * factor = api().ggml_new_tensor_2d(compute.get(), TYPE_F32, bench->width, 1);
    tt::Tensor * last = input;
    for (size_t i = 0; i < count; ++i) {
        if (i % 3 == 0) {
            last = api().ggml_rms_norm(compute.get(), last, 1e-5f);
        } else if (i % 3 == 1) {
            last = api().ggml_mul(compute.get(), last, factor);
        } else {
            last = api().ggml_add(compute.get(), last, factor);
        }
    }
    api().ggml_build_forward_expand(graph, last);
    const BufferPtr buffer = allocate(compute, api().ggml_backend_dev_buffer_type(device), error, error_size);
    if (!buffer) {
        return -1;
    }
    fill(input);
    fill(factor);
    return time_graph(backend.get(), graph, seconds, capacity, error, error_size);
}

int tt_bench_copy(const tt_copy_bench * bench, double * seconds, int capacity, char * error,
                  size_t error_size) {
    const BackendPtr backend = start_backend(bench->device, 1, error, error_size);
    if (!backend) {
        return -1;
    }
    tt::Device * device = api().ggml_backend_get_device(backend.get());
    const size_t size = static_cast<size_t>(bench->bytes);
    const BufferPtr there(
        api().ggml_backend_buft_alloc_buffer(api().ggml_backend_dev_buffer_type(device), size));
    const ContextPtr context = make_context(1, 0);
    tt::Tensor * tensor = api().ggml_new_tensor_2d(context.get(), TYPE_F32,
                                                   bench->bytes / static_cast<int64_t>(sizeof(float)), 1);
    if (!there || api().ggml_backend_tensor_alloc(there.get(), tensor,
                                                  api().ggml_backend_buffer_get_base(there.get())) != 0) {
        return fail(error, error_size, std::string("not enough memory on ") + bench->device);
    }
    std::vector<char> pageable;
    BufferPtr pinned;
    char * here = nullptr;
    if (bench->pinned) {
        tt::BufferType * buft = api().ggml_backend_dev_host_buffer_type(device);
        if (!buft) {
            return 0;
        }
        pinned.reset(api().ggml_backend_buft_alloc_buffer(buft, size));
        if (!pinned) {
            return fail(error, error_size, std::string("not enough pinned memory for ") + bench->device);
        }
        here = static_cast<char *>(api().ggml_backend_buffer_get_base(pinned.get()));
        std::memset(here, 1, size);
    } else {
        pageable.resize(size, 1);
        here = pageable.data();
    }
    for (int run = -1; run < capacity; ++run) {
        const auto start = std::chrono::steady_clock::now();
        if (bench->to_device) {
            api().ggml_backend_tensor_set(tensor, here, 0, size);
            float value = 0.0f;
            api().ggml_backend_tensor_get(tensor, &value, 0, sizeof(value)); // as in time_graph
        } else {
            api().ggml_backend_tensor_get(tensor, here, 0, size);
        }
        api().ggml_backend_synchronize(backend.get());
        if (run >= 0) {
            seconds[run] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        }
    }
    return capacity;
}
