// The part of ggml and llama.cpp that the plug-in uses: functions resolved at run time from the libraries
// the process has loaded, and the structures that cross the border, declared in our own words.
//
// Nothing here is trusted until bind() has compared it with what the loaded library really does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tt {

// The release of ggml whose layout is declared below.
inline constexpr const char * GGML_VERSION = "0.25.3";
inline constexpr int BACKEND_API_VERSION = 2;

inline constexpr int MAX_DIMS = 4;
inline constexpr int MAX_OP_PARAMS_BYTES = 64;
inline constexpr int MAX_SRC = 10;
inline constexpr int MAX_NAME = 64;

struct Context;    // ggml_context
struct Buffer;     // ggml_backend_buffer
struct BufferType; // ggml_backend_buffer_type
struct Device;     // ggml_backend_device
struct Backend;    // ggml_backend
struct Graph;      // ggml_cgraph

// ggml_tensor
struct Tensor {
    int32_t type;
    Buffer * buffer;
    int64_t ne[MAX_DIMS]; // elements
    size_t nb[MAX_DIMS];  // strides in bytes
    int32_t op;
    int32_t op_params[MAX_OP_PARAMS_BYTES / sizeof(int32_t)];
    int32_t flags;
    Tensor * src[MAX_SRC];
    Tensor * view_src;
    size_t view_offs;
    void * data;
    char name[MAX_NAME];
    void * extra;
    char padding[8];
};

struct Registry;    // ggml_backend_reg
struct DeviceProps; // ggml_backend_dev_props
struct BufferInterface;

// ggml_init_params
struct InitParams {
    size_t mem_size;
    void * mem_buffer;
    bool no_alloc;
};

// Every function that is resolved: result, name, parameters.
#define TT_GGML_FUNCTIONS(X)                                                                                 \
    X(const char *, ggml_version, (void))                                                                    \
    X(Context *, ggml_init, (InitParams params))                                                             \
    X(void, ggml_free, (Context * ctx))                                                                      \
    X(size_t, ggml_tensor_overhead, (void))                                                                  \
    X(Tensor *, ggml_new_tensor_2d, (Context * ctx, int type, int64_t ne0, int64_t ne1))                     \
    X(Tensor *, ggml_set_name, (Tensor * tensor, const char * name))                                         \
    X(void, ggml_set_input, (Tensor * tensor))                                                               \
    X(Tensor *, ggml_mul_mat, (Context * ctx, Tensor * a, Tensor * b))                                       \
    X(Tensor *, ggml_mul_mat_id, (Context * ctx, Tensor * as, Tensor * b, Tensor * ids))                     \
    X(Tensor *, ggml_new_tensor_3d, (Context * ctx, int type, int64_t ne0, int64_t ne1, int64_t ne2))        \
    X(Tensor *, ggml_view_1d, (Context * ctx, Tensor * a, int64_t ne0, size_t offset))                       \
    X(Tensor *, ggml_permute, (Context * ctx, Tensor * a, int axis0, int axis1, int axis2, int axis3))       \
    X(const char *, ggml_op_name, (int op))                                                                  \
    X(const char *, ggml_type_name, (int type))                                                              \
    X(size_t, ggml_nbytes, (const Tensor * tensor))                                                          \
    X(Buffer *, ggml_backend_alloc_ctx_tensors_from_buft, (Context * ctx, BufferType * buft))                \
    X(void *, ggml_backend_buffer_get_base, (Buffer * buffer))                                               \
    X(void, ggml_backend_buffer_free, (Buffer * buffer))                                                     \
    X(BufferType *, ggml_backend_cpu_buffer_type, (void))                                                    \
    X(const char *, ggml_backend_buft_name, (BufferType * buft))                                             \
    X(bool, ggml_backend_buft_is_host, (BufferType * buft))                                                  \
    X(size_t, ggml_backend_buft_get_alignment, (BufferType * buft))                                          \
    X(Buffer *, ggml_backend_cpu_buffer_from_ptr, (void * ptr, size_t size))                                 \
    X(BufferType *, ggml_backend_buffer_get_type, (Buffer * buffer))                                         \
    X(size_t, ggml_backend_buffer_get_size, (Buffer * buffer))                                               \
    X(int, ggml_backend_buffer_get_usage, (Buffer * buffer))                                                 \
    X(Buffer *, ggml_backend_buffer_init,                                                                    \
      (BufferType * buft, BufferInterface iface, void * context, size_t size))                               \
    X(void, ggml_backend_register, (Registry * registry))                                                    \
    X(Device *, ggml_backend_dev_by_type, (int type))                                                        \
    X(Device *, ggml_backend_buft_get_device, (BufferType * buft))                                           \
    X(const char *, ggml_backend_dev_name, (Device * device))                                                \
    X(size_t, ggml_backend_reg_count, (void))                                                                \
    X(Registry *, ggml_backend_reg_get, (size_t index))                                                      \
    X(void *, ggml_backend_reg_get_proc_address, (Registry * registry, const char * name))                   \
    X(BufferType *, ggml_backend_dev_buffer_type, (Device * device))                                         \
    X(Registry *, ggml_backend_dev_backend_reg, (Device * device))                                           \
    X(Device *, ggml_backend_dev_by_name, (const char * name))                                               \
    X(Backend *, ggml_backend_dev_init, (Device * device, const char * params))                              \
    X(bool, ggml_backend_dev_supports_op, (Device * device, const Tensor * op))                              \
    X(Device *, ggml_backend_get_device, (Backend * backend))                                                \
    X(void, ggml_backend_free, (Backend * backend))                                                          \
    X(void, ggml_backend_synchronize, (Backend * backend))                                                   \
    X(int, ggml_backend_graph_compute, (Backend * backend, Graph * graph))                                   \
    X(Buffer *, ggml_backend_buft_alloc_buffer, (BufferType * buft, size_t size))                            \
    X(void, ggml_backend_buffer_set_usage, (Buffer * buffer, int usage))                                     \
    X(void, ggml_backend_tensor_set, (Tensor * tensor, const void * data, size_t offset, size_t size))       \
    X(void, ggml_backend_tensor_get, (const Tensor * tensor, void * data, size_t offset, size_t size))       \
    X(int, ggml_backend_tensor_alloc, (Buffer * buffer, Tensor * tensor, void * address))                    \
    X(BufferType *, ggml_backend_dev_host_buffer_type, (Device * device))                                    \
    X(size_t, ggml_row_size, (int type, int64_t elements))                                                   \
    X(size_t, ggml_quantize_chunk,                                                                           \
      (int type, const float * src, void * dst, int64_t start, int64_t rows, int64_t per_row,                \
       const float * imatrix))                                                                               \
    X(size_t, ggml_graph_overhead_custom, (size_t size, bool grads))                                         \
    X(Graph *, ggml_new_graph_custom, (Context * ctx, size_t size, bool grads))                              \
    X(void, ggml_build_forward_expand, (Graph * graph, Tensor * tensor))                                     \
    X(Tensor *, ggml_graph_node, (Graph * graph, int index))                                                 \
    X(int, ggml_graph_n_nodes, (Graph * graph))                                                              \
    X(void, ggml_graph_clear, (Graph * graph))                                                               \
    X(void, ggml_graph_add_node, (Graph * graph, Tensor * tensor))                                           \
    X(Tensor *, ggml_rms_norm, (Context * ctx, Tensor * a, float eps))                                       \
    X(Tensor *, ggml_mul, (Context * ctx, Tensor * a, Tensor * b))                                           \
    X(Tensor *, ggml_add, (Context * ctx, Tensor * a, Tensor * b))                                           \
    X(Tensor *, ggml_flash_attn_ext,                                                                         \
      (Context * ctx, Tensor * q, Tensor * k, Tensor * v, Tensor * mask, float scale, float max_bias,        \
       float logit_softcap))

struct GgmlApi {
#define TT_DECLARE(result, name, params) result(*name) params = nullptr;
    TT_GGML_FUNCTIONS(TT_DECLARE)
#undef TT_DECLARE
    void * llama_get_memory_breakdown = nullptr; // a C++ function: probe.cpp knows its type
};

// The functions; null pointers until bind() has returned an empty string.
const GgmlApi & api();

// True once bind() has succeeded.
bool bound();

// Resolves everything from the loaded library and checks its layout. Returns what is wrong, or nothing.
std::string bind(const char * libllama_path);

} // namespace tt
