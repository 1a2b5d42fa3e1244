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
// with one line of explanation in `error` (always terminated). Later calls are answered from the first.
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
