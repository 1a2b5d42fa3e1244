// The C interface of the native plug-in, as Python calls it.
//
// Everything here is safe to call from any thread once tt_bind has returned 0. Strings are UTF-8.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TT_API extern "C" __declspec(dllexport)
#else
#define TT_API extern "C" __attribute__((visibility("default")))
#endif

// Finds the functions of ggml and llama.cpp in the library at `libllama_path`, which the process must have
// loaded already, and checks that its structures are the ones this plug-in was written for. Returns 0, or 1
// with one line of explanation in `error` (always terminated). After a success, later calls change nothing.
TT_API int tt_bind(const char * libllama_path, char * error, size_t error_size);

// The version of ggml this plug-in was written for, such as "0.25.3".
TT_API const char * tt_ggml_version(void);

// What one buffer type holds for a context, in bytes.
struct tt_memory_row {
    char buffer_type[64];
    char device[128]; // ggml's name of the device; "CPU" for every buffer in host memory
    uint64_t weights; // the model's tensors
    uint64_t context; // KV cache and recurrent state
    uint64_t compute; // the scheduler's buffers for intermediate results
};

// llama.cpp's own account of a context's memory (llama_get_memory_breakdown, a C++ function). Writes up to
// `capacity` rows and returns how many there are, or -1 when tt_bind has not succeeded.
TT_API int tt_memory_breakdown(const void * llama_context, struct tt_memory_row * rows, int capacity);

// A ggml_abort_callback: true once *flag (an int32_t that outlives the context) is not 0. Native, because
// ggml asks after every node of the graph and a call into Python there would cost more than the node.
TT_API bool tt_should_abort(void * flag);

// Sets or clears such a flag, visible to all threads.
TT_API void tt_set_flag(int32_t * flag, int32_t value);

// One graph of `count` products of different weights, so that none is found in a cache.
struct tt_mul_mat_bench {
    const char * device; // ggml's name
    int32_t type;        // ggml_type of the weights
    int32_t count;       // matrices in the graph
    int64_t k;           // columns: the input's width
    int64_t n;           // rows: the output's width
    int64_t batch;       // tokens
    int32_t experts;     // 0: MUL_MAT; else MUL_MAT_ID with so many experts in each weight ...
    int32_t used;        // ... of which each token uses these
    int32_t threads;     // for backends that have threads
    int32_t repack;      // 1: weights in the CPU backend's reordering buffer type
};

// Runs it once and then `capacity` times; seconds of each run. Returns the number of runs, 0 when the device
// has no kernel for this, or -1 with one line in `error`.
TT_API int tt_bench_mul_mat(const struct tt_mul_mat_bench * bench, double * seconds, int capacity,
                            char * error, size_t error_size);

// One graph of `count` attentions (FLASH_ATTN_EXT), each over KV caches of its own.
struct tt_attention_bench {
    const char * device;
    int32_t type; // of keys and values
    int32_t count;
    int64_t head_dim; // of keys and of values
    int64_t heads;
    int64_t kv_heads;
    int64_t cells; // tokens in the cache
    int64_t batch; // tokens that ask
    int32_t threads;
};

// As tt_bench_mul_mat.
TT_API int tt_bench_attention(const struct tt_attention_bench * bench, double * seconds, int capacity,
                              char * error, size_t error_size);

// One graph of `count` small operations on `rows` vectors of `width` values, each on the last one's result: a norm,
// a product and a sum in turn, as between the weights of a layer.
struct tt_small_ops_bench {
    const char * device;
    int32_t count;
    int64_t width;
    int64_t rows; // tokens
    int32_t threads;
};

// As tt_bench_mul_mat.
TT_API int tt_bench_small_ops(const struct tt_small_ops_bench * bench, double * seconds, int capacity,
                              char * error, size_t error_size);

// Copies between main memory and a device's own.
struct tt_copy_bench {
    const char * device;
    int64_t bytes;
    int32_t pinned;    // 1: main memory that the device's driver allocated
    int32_t to_device; // 0: from the device
};

// As tt_bench_mul_mat; 0 runs where the device has no pinned memory to offer.
TT_API int tt_bench_copy(const struct tt_copy_bench * bench, double * seconds, int capacity, char * error,
                         size_t error_size);
