// ggml's structures of function pointers, through which a backend is made outside of ggml: declared in our
// own words, and compared by check_interfaces() with what the loaded library has.
//
// A null pointer stands for a function that is optional and not there.
#pragma once

#include "ggml_api.h"

namespace tt {

// ggml_backend_buffer_type
struct BufferTypeInterface {
    const char * (*get_name)(BufferType * buft);
    Buffer * (*alloc_buffer)(BufferType * buft, size_t size);
    size_t (*get_alignment)(BufferType * buft);
    size_t (*get_max_size)(BufferType * buft);
    size_t (*get_alloc_size)(BufferType * buft, const Tensor * tensor);
    bool (*is_host)(BufferType * buft);
};
struct BufferType {
    BufferTypeInterface iface;
    Device * device;
    void * context;
};

// ggml_backend_buffer
struct BufferInterface {
    void (*free_buffer)(Buffer * buffer);
    void * (*get_base)(Buffer * buffer);
    int (*init_tensor)(Buffer * buffer, Tensor * tensor);
    void (*memset_tensor)(Buffer * buffer, Tensor * tensor, uint8_t value, size_t offset, size_t size);
    void (*set_tensor)(Buffer * buffer, Tensor * tensor, const void * data, size_t offset, size_t size);
    void (*get_tensor)(Buffer * buffer, const Tensor * tensor, void * data, size_t offset, size_t size);
    void (*set_tensor_2d)(Buffer * buffer, Tensor * tensor, const void * data, size_t offset, size_t size,
                          size_t copies, size_t stride_tensor, size_t stride_data);
    void (*get_tensor_2d)(Buffer * buffer, const Tensor * tensor, void * data, size_t offset, size_t size,
                          size_t copies, size_t stride_tensor, size_t stride_data);
    bool (*cpy_tensor)(Buffer * buffer, const Tensor * src, Tensor * dst);
    void (*clear)(Buffer * buffer, uint8_t value);
    void (*reset)(Buffer * buffer);
};
struct Buffer {
    BufferInterface iface;
    BufferType * buft;
    void * context;
    size_t size;
    int usage;
};

// ggml_backend; the functions we have no use for stay untyped
struct BackendInterface {
    const char * (*get_name)(Backend * backend);
    void (*free)(Backend * backend);
    void * tensor_access_async[4];
    void * cpy_tensor_async;
    void (*synchronize)(Backend * backend);
    void * graph_plan[4];
    int (*graph_compute)(Backend * backend, Graph * graph);
    void * event[2];
    void * graph_optimize;
};
struct Backend {
    const uint8_t (*guid)[16];
    BackendInterface iface;
    Device * device;
    void * context;
};

// ggml_backend_device
struct DeviceCaps {
    bool async;
    bool host_buffer;
    bool buffer_from_host_ptr;
    bool events;
    bool mmap_support;
};
struct DeviceProps {
    const char * name;
    const char * description;
    size_t memory_free;
    size_t memory_total;
    int type;
    const char * device_id;
    DeviceCaps caps;
};
struct DeviceInterface {
    const char * (*get_name)(Device * device);
    const char * (*get_description)(Device * device);
    void (*get_memory)(Device * device, size_t * free, size_t * total);
    int (*get_type)(Device * device);
    void (*get_props)(Device * device, DeviceProps * props);
    Backend * (*init_backend)(Device * device, const char * params);
    BufferType * (*get_buffer_type)(Device * device);
    BufferType * (*get_host_buffer_type)(Device * device);
    void * buffer_from_host_ptr;
    bool (*supports_op)(Device * device, const Tensor * op);
    bool (*supports_buft)(Device * device, BufferType * buft);
    bool (*offload_op)(Device * device, const Tensor * op);
    void * event[3];
};
struct Device {
    DeviceInterface iface;
    Registry * registry;
    void * context;
};

// ggml_backend_reg
struct RegistryInterface {
    const char * (*get_name)(Registry * registry);
    size_t (*get_device_count)(Registry * registry);
    Device * (*get_device)(Registry * registry, size_t index);
    void * (*get_proc_address)(Registry * registry, const char * name);
};
struct Registry {
    int api_version;
    RegistryInterface iface;
    void * context;
};

// Numbers of ggml's enumerations
inline constexpr int DEVICE_TYPE_CPU = 0;
inline constexpr int DEVICE_TYPE_ACCEL = 3;
inline constexpr int USAGE_WEIGHTS = 1;
inline constexpr int STATUS_ALLOC_FAILED = -2;
inline constexpr int STATUS_FAILED = -1;
inline constexpr int STATUS_SUCCESS = 0;

// What is laid out differently in the loaded library, or null. Reads only: of the CPU device, a buffer and a
// backend that ggml makes, and of structures of ours through ggml's accessors.
const char * check_interfaces(const GgmlApi & ggml);

} // namespace tt
