// The ggml device "TIER": llama.cpp puts chosen weights into its buffer type, and its scheduler then hands us
// the operations that use them. Everything else the device has is the inner device's, the CPU's: its default
// buffer type above all, which is where the results of our operations go.

#include "backend.h"

#include <cstring>
#include <new>
#include <string>

namespace tt {
namespace {

constexpr const char * NAME = "TIER";

// --- buffers: address space with nothing behind it

struct PagedBuffer {
    std::shared_ptr<PagedType> type;
    Memory address_space;
    Store & store() const { return *type->store; }
};

PagedBuffer & paged_buffer(const Buffer * buffer) {
    return *static_cast<PagedBuffer *>(buffer->context);
}

void free_buffer(Buffer * buffer) {
    PagedBuffer & paged = paged_buffer(buffer);
    paged.store().forget_tensors();
    delete &paged;
}

void * get_base(Buffer * buffer) {
    return paged_buffer(buffer).address_space.data();
}

int init_tensor(Buffer * buffer, Tensor * tensor) {
    if (tensor->view_src) {
        return STATUS_SUCCESS;
    }
    Store & store = paged_buffer(buffer).store();
    Weight * weight = store.find(tensor->name);
    if (!weight || weight->nbytes != api().ggml_nbytes(tensor)) {
        store.failed(std::string("no data on the drive is known for ") + tensor->name);
        return STATUS_FAILED;
    }
    store.hide(*weight, tensor);
    return STATUS_SUCCESS;
}

// llama.cpp has nothing to set: while it loads, our tensors have no bytes (Store::hide).
void set_tensor(Buffer * buffer, Tensor * tensor, const void *, size_t, size_t) {
    Store & store = paged_buffer(buffer).store();
    const std::lock_guard<std::mutex> lock(store.mutex);
    store.failed(std::string("a weight on the drive cannot be written: ") + tensor->name);
}

void memset_tensor(Buffer * buffer, Tensor * tensor, uint8_t, size_t, size_t) {
    set_tensor(buffer, tensor, nullptr, 0, 0);
}

void get_tensor(Buffer * buffer, const Tensor * tensor, void * data, size_t offset, size_t size) {
    Store & store = paged_buffer(buffer).store();
    const std::lock_guard<std::mutex> lock(store.mutex);
    try {
        const Tensor * origin = tensor->view_src ? tensor->view_src : tensor;
        const size_t at = offset + (tensor->view_src ? tensor->view_offs : 0);
        store.read_weight(*static_cast<const Weight *>(origin->extra), at, size, data);
    } catch (const std::exception & error) {
        std::memset(data, 0, size);
        store.failed(error.what());
    }
}

bool copy_tensor(Buffer *, const Tensor *, Tensor *) {
    return false;
}

void clear(Buffer *, uint8_t) {} // weights come from the file

BufferInterface buffer_interface() {
    BufferInterface iface{};
    iface.free_buffer = free_buffer;
    iface.get_base = get_base;
    iface.init_tensor = init_tensor;
    iface.memset_tensor = memset_tensor;
    iface.set_tensor = set_tensor;
    iface.get_tensor = get_tensor;
    iface.cpy_tensor = copy_tensor;
    iface.clear = clear;
    return iface;
}

// --- buffer types

const char * type_name(BufferType *) {
    return NAME;
}

Buffer * alloc_buffer(BufferType * buft, size_t size) {
    PagedType & paged = *static_cast<PagedType *>(buft->context);
    if (!paged.store) {
        return nullptr; // this one is for models without data
    }
    try {
        auto * context = new PagedBuffer{paged.shared_from_this(), Memory(size, false)};
        return api().ggml_backend_buffer_init(buft, buffer_interface(), context, size);
    } catch (const std::bad_alloc &) {
        return nullptr; // llama.cpp says that it is out of memory
    }
}

size_t get_alignment(BufferType *) {
    return Reader::CACHE_LINE;
}

// Not the host's: nobody but us may look at the data.
bool is_host(BufferType *) {
    return false;
}

// --- device

const char * device_name(Device *) {
    return NAME;
}

const char * device_description(Device *) {
    return "weights read from the drive when they are needed";
}

void device_memory(Device *, size_t * free, size_t * total) {
    *free = 0;
    *total = 0;
}

int device_type(Device *) {
    return DEVICE_TYPE_ACCEL;
}

void device_props(Device *, DeviceProps * props) {
    *props = DeviceProps{};
    props->name = NAME;
    props->description = device_description(nullptr);
    props->type = DEVICE_TYPE_ACCEL;
    props->caps.mmap_support = true;
}

Backend * init_backend(Device * device, const char *) {
    try {
        return make_backend(device);
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

BufferType * default_type(Device *) {
    return api().ggml_backend_dev_buffer_type(inner_device());
}

// Whether the inner device would compute this if the weight lay in its memory.
bool inner_supports(const Tensor * op) {
    Tensor asked = *op;
    Tensor sources[MAX_SRC];
    for (int i = 0; i < MAX_SRC; ++i) {
        if (op->src[i] && is_paged(op->src[i])) {
            sources[i] = *op->src[i];
            sources[i].buffer = nullptr;
            sources[i].view_src = nullptr;
            asked.src[i] = &sources[i];
        }
    }
    return api().ggml_backend_dev_supports_op(inner_device(), &asked);
}

const Tensor * through_views(const Tensor * tensor) {
    const Operations & ops = operations();
    while (tensor && (tensor->op == ops.view || tensor->op == ops.reshape)) {
        tensor = tensor->src[0];
    }
    return tensor;
}

// The activation between two products of paged weights: with it, both come to us in one piece of the graph.
bool follows_paged_product(const Tensor * op) {
    const Operations & ops = operations();
    for (int steps = 0; steps < 4; ++steps) {
        if (op->op != ops.glu && op->op != ops.unary && op->op != ops.scale && op->op != ops.clamp) {
            return false;
        }
        for (const Tensor * source : op->src) {
            const Tensor * origin = source ? through_views(source) : nullptr;
            if (origin && origin->buffer && origin->buffer->usage == USAGE_WEIGHTS) {
                return false;
            }
        }
        op = through_views(op->src[0]);
        if (!op) {
            return false;
        }
        if (op->src[0] && is_paged(op->src[0])) {
            return true;
        }
    }
    return false;
}

bool supports_op(Device *, const Tensor * op) {
    if (op->op == operations().none) {
        return is_paged(op);
    }
    for (const Tensor * source : op->src) {
        if (source && is_paged(source)) {
            return inner_supports(op);
        }
    }
    return follows_paged_product(op);
}

bool supports_buft(Device *, BufferType * buft) {
    return buft->iface.get_name == type_name || api().ggml_backend_buft_is_host(buft);
}

// --- registry

extern Registry g_registry;
Device g_device{};

const char * registry_name(Registry *) {
    return NAME;
}

size_t device_count(Registry *) {
    return 1;
}

Device * get_device(Registry *, size_t) {
    return &g_device;
}

void * proc_address(Registry *, const char * name) {
    if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(set_threads);
    }
    if (std::strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return reinterpret_cast<void *>(set_abort_callback);
    }
    return nullptr;
}

Registry g_registry{BACKEND_API_VERSION, {registry_name, device_count, get_device, proc_address}, nullptr};

Operations find_operations() {
    Operations found{};
    const struct {
        const char * name;
        int * number;
    } wanted[] = {
        {"NONE", &found.none},
        {"VIEW", &found.view},
        {"RESHAPE", &found.reshape},
        {"PERMUTE", &found.permute},
        {"TRANSPOSE", &found.transpose},
        {"MUL_MAT_ID", &found.mul_mat_id},
        {"GLU", &found.glu},
        {"UNARY", &found.unary},
        {"SCALE", &found.scale},
        {"CLAMP", &found.clamp},
        {"MUL", &found.mul},
        {"ADD", &found.add},
        {"MUL_MAT", &found.mul_mat},
    };
    constexpr int MOST_OPERATIONS =
        101; // ggml ends the process when asked for the name of one it does not have
    for (const auto & each : wanted) {
        *each.number = -1;
        for (int op = 0; op < MOST_OPERATIONS; ++op) {
            if (std::strcmp(api().ggml_op_name(op), each.name) == 0) {
                *each.number = op;
                break;
            }
        }
        if (*each.number < 0) {
            throw ReadError(std::string("this ggml has no operation ") + each.name);
        }
    }
    return found;
}

} // namespace

Device * inner_device() {
    static Device * const device = api().ggml_backend_dev_by_type(DEVICE_TYPE_CPU);
    return device;
}

const Operations & operations() {
    static const Operations found = find_operations();
    return found;
}

bool is_paged(const Tensor * tensor) {
    const Buffer * buffer = tensor->view_src ? tensor->view_src->buffer : tensor->buffer;
    return buffer && buffer->buft->iface.get_name == type_name;
}

std::shared_ptr<PagedType> make_paged_type(std::shared_ptr<Store> store) {
    auto paged = std::make_shared<PagedType>();
    paged->type.iface.get_name = type_name;
    paged->type.iface.alloc_buffer = alloc_buffer;
    paged->type.iface.get_alignment = get_alignment;
    paged->type.iface.is_host = is_host;
    paged->type.device = tier_device();
    paged->type.context = paged.get();
    paged->store = std::move(store);
    return paged;
}

Device * tier_device() {
    static const bool registered = [] {
        operations();
        g_device.iface.get_name = device_name;
        g_device.iface.get_description = device_description;
        g_device.iface.get_memory = device_memory;
        g_device.iface.get_type = device_type;
        g_device.iface.get_props = device_props;
        g_device.iface.init_backend = init_backend;
        g_device.iface.get_buffer_type = default_type;
        g_device.iface.supports_op = supports_op;
        g_device.iface.supports_buft = supports_buft;
        g_device.registry = &g_registry;
        api().ggml_backend_register(&g_registry);
        return true;
    }();
    return registered ? &g_device : nullptr;
}

} // namespace tt
