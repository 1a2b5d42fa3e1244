#include "ggml_interfaces.h"

namespace tt {
namespace {

// A buffer that ggml makes of these has to show them in our declaration.
void free_nothing(Buffer *) {}
void * some_base(Buffer * buffer) {
    return buffer;
}

const char * check_buffer(const GgmlApi & ggml) {
    BufferType buft{};
    int context = 0;
    BufferInterface iface{};
    iface.free_buffer = free_nothing;
    iface.get_base = some_base;
    // the last two of the table, so that a longer or shorter one shows
    iface.clear = [](Buffer *, uint8_t) {};
    iface.reset = free_nothing;
    Buffer * buffer = ggml.ggml_backend_buffer_init(&buft, iface, &context, 4097);
    const char * wrong = nullptr;
    if (buffer->iface.free_buffer != free_nothing || buffer->iface.reset != free_nothing ||
        buffer->iface.clear != iface.clear) {
        wrong = "buffer interface";
    } else if (buffer->buft != &buft || ggml.ggml_backend_buffer_get_type(buffer) != &buft ||
               buffer->context != &context || buffer->size != 4097 ||
               ggml.ggml_backend_buffer_get_size(buffer) != 4097 ||
               ggml.ggml_backend_buffer_get_base(buffer) != buffer) {
        wrong = "buffer";
    } else {
        ggml.ggml_backend_buffer_set_usage(buffer, USAGE_WEIGHTS);
        if (buffer->usage != USAGE_WEIGHTS) {
            wrong = "buffer usage";
        }
    }
    ggml.ggml_backend_buffer_free(buffer);
    return wrong;
}

} // namespace

const char * check_interfaces(const GgmlApi & ggml) {
    Device * cpu = ggml.ggml_backend_dev_by_type(DEVICE_TYPE_CPU);
    if (!cpu) {
        return "there is no CPU device";
    }
    Registry * registry = ggml.ggml_backend_dev_backend_reg(cpu);
    if (cpu->registry != registry || !cpu->iface.supports_op || !cpu->iface.supports_buft ||
        cpu->iface.offload_op || cpu->iface.event[0] || cpu->iface.event[2]) {
        return "device";
    }
    if (registry->api_version != BACKEND_API_VERSION || !registry->iface.get_proc_address ||
        !registry->iface.get_device) {
        return "registry";
    }
    BufferType * host = ggml.ggml_backend_dev_buffer_type(cpu);
    if (!host->iface.get_name || !host->iface.alloc_buffer || !host->iface.is_host ||
        host->device != ggml.ggml_backend_buft_get_device(host)) {
        return "buffer type";
    }
    // an own buffer type and device, read by the library
    Device device{};
    device.registry = registry;
    BufferType buft{};
    buft.device = &device;
    if (ggml.ggml_backend_buft_get_device(&buft) != &device ||
        ggml.ggml_backend_dev_backend_reg(&device) != registry) {
        return "buffer type";
    }
    Backend * backend = ggml.ggml_backend_dev_init(cpu, nullptr);
    if (!backend) {
        return "the CPU device does not start";
    }
    const bool as_declared = backend->device == cpu && ggml.ggml_backend_get_device(backend) == cpu &&
                             backend->iface.get_name && backend->iface.free && backend->iface.graph_compute &&
                             !backend->iface.synchronize && !backend->iface.event[0] &&
                             !backend->iface.graph_optimize && backend->context;
    ggml.ggml_backend_free(backend);
    if (!as_declared) {
        return "backend";
    }
    return check_buffer(ggml);
}

} // namespace tt
