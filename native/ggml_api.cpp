#include "ggml_api.h"

#include "ggml_interfaces.h"
#include "tensortier.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace tt {
namespace {

GgmlApi g_api;
std::atomic<bool> g_bound{false};

#if defined(_WIN32)
// Each DLL has to be asked by itself; all of them lie beside llama.dll and are loaded with it.
class Library {
public:
    bool open(const char * path) {
        const int length = MultiByteToWideChar(CP_UTF8, 0, path, -1, nullptr, 0);
        std::wstring wide(static_cast<size_t>(std::max(length, 1)), L'\0');
        MultiByteToWideChar(CP_UTF8, 0, path, -1, wide.data(), length);
        handles_[0] = GetModuleHandleW(wide.c_str());
        handles_[1] = GetModuleHandleA("ggml-base.dll");
        handles_[2] = GetModuleHandleA("ggml.dll");
        handles_[3] = GetModuleHandleA("ggml-cpu.dll");
        return handles_[0] && handles_[1];
    }
    void * find(const char * name) const {
        for (HMODULE handle : handles_) {
            if (!handle) {
                continue;
            }
            if (FARPROC symbol = GetProcAddress(handle, name)) {
                return reinterpret_cast<void *>(symbol);
            }
        }
        return nullptr;
    }

private:
    HMODULE handles_[4] = {};
};
constexpr const char * BREAKDOWN_SYMBOL =
    "?llama_get_memory_breakdown@@YA?AV?$map@PEAUggml_backend_buffer_type@@Ullama_memory_breakdown_data@@U?"
    "$less@PEAUggml_backend_buffer_type@@@std@@V?$allocator@U?$pair@QEAUggml_backend_buffer_type@@Ullama_"
    "memory_breakdown_data@@@std@@@4@@std@@PEBUllama_context@@@Z";
#else
// dlsym on a library's handle also searches what that library depends on, so the one handle of libllama
// reaches exactly the copy of ggml it uses (an installation may hold several copies under other names).
class Library {
public:
    ~Library() {
        if (handle_) {
            dlclose(handle_); // RTLD_NOLOAD counted one reference more
        }
    }
    bool open(const char * path) {
        handle_ = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
        return handle_ != nullptr;
    }
    void * find(const char * name) const { return dlsym(handle_, name); }

private:
    void * handle_ = nullptr;
};
constexpr const char * BREAKDOWN_SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context";
#endif

// The numbers of ggml's types are part of its file format and do not change.
constexpr int TYPE_F32 = 0;
constexpr int TYPE_Q4_0 = 2;
constexpr int TYPE_I32 = 26;

// Owns a small ggml context, and the buffer of its tensors where there is one.
struct Scratch {
    explicit Scratch(const GgmlApi & ggml) : ggml_(ggml) {
        ctx = ggml.ggml_init({ggml.ggml_tensor_overhead() * 16, nullptr, true});
    }
    Scratch(const Scratch &) = delete;
    Scratch & operator=(const Scratch &) = delete;
    ~Scratch() {
        if (buffer) {
            ggml_.ggml_backend_buffer_free(buffer);
        }
        if (ctx) {
            ggml_.ggml_free(ctx);
        }
    }
    Context * ctx = nullptr;
    Buffer * buffer = nullptr;

private:
    const GgmlApi & ggml_;
};

std::string mismatch(const char * what) {
    return std::string("this ggml is laid out differently (") + what +
           "); install the version of llama-cpp-python that tensortier names";
}

// Builds a few tensors through ggml's own functions and reads them back through our declarations. Each field
// is seen with a value that it has in no other place, so a shifted field cannot pass.
std::string check_layout(const GgmlApi & ggml) {
    if (std::strcmp(ggml.ggml_version(), GGML_VERSION) != 0) {
        return std::string("this plug-in is for ggml ") + GGML_VERSION + ", loaded is " +
               ggml.ggml_version() + "; install the version of llama-cpp-python that tensortier names";
    }
    for (size_t i = 0; i < ggml.ggml_backend_reg_count(); ++i) {
        if (ggml.ggml_backend_reg_get(i)->api_version != BACKEND_API_VERSION) {
            return mismatch("backend API version");
        }
    }
    // overhead = sizeof(ggml_object) + sizeof(ggml_tensor); ggml_object is four words
    if (ggml.ggml_tensor_overhead() != sizeof(Tensor) + 4 * sizeof(void *)) {
        return mismatch("size of ggml_tensor");
    }
    Scratch scratch(ggml);
    if (!scratch.ctx) {
        return "ggml_init failed: out of memory";
    }
    Tensor * weight = ggml.ggml_new_tensor_3d(scratch.ctx, TYPE_Q4_0, 64, 5, 3);
    Tensor * input = ggml.ggml_new_tensor_3d(scratch.ctx, TYPE_F32, 64, 1, 7);
    Tensor * ids = ggml.ggml_new_tensor_2d(scratch.ctx, TYPE_I32, 2, 7);
    ggml.ggml_set_name(weight, "tensortier.check");
    ggml.ggml_set_input(input);
    if (weight->type != TYPE_Q4_0 || input->type != TYPE_F32 || ids->type != TYPE_I32) {
        return mismatch("type");
    }
    if (weight->ne[0] != 64 || weight->ne[1] != 5 || weight->ne[2] != 3 || weight->ne[3] != 1) {
        return mismatch("ne");
    }
    // Q4_0: 18 bytes per block of 32
    if (weight->nb[0] != 18 || weight->nb[1] != 36 || weight->nb[2] != 180 || weight->nb[3] != 540) {
        return mismatch("nb");
    }
    if (std::strcmp(weight->name, "tensortier.check") != 0) {
        return mismatch("name");
    }
    if (weight->flags != 0 || input->flags != 1) {
        return mismatch("flags");
    }
    const Tensor * product = ggml.ggml_mul_mat_id(scratch.ctx, weight, input, ids);
    if (std::strcmp(ggml.ggml_op_name(product->op), "MUL_MAT_ID") != 0) {
        return mismatch("op");
    }
    if (product->src[0] != weight || product->src[1] != input || product->src[2] != ids || product->src[3]) {
        return mismatch("src");
    }
    const Tensor * permuted = ggml.ggml_permute(scratch.ctx, input, 0, 2, 1, 3);
    if (permuted->op_params[0] != 0 || permuted->op_params[1] != 2 || permuted->op_params[2] != 1 ||
        permuted->op_params[3] != 3) {
        return mismatch("op_params");
    }
    const Tensor * view = ggml.ggml_view_1d(scratch.ctx, input, 8, 16);
    if (view->view_src != input || view->view_offs != 16) {
        return mismatch("view_src");
    }
    scratch.buffer =
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(scratch.ctx, ggml.ggml_backend_cpu_buffer_type());
    if (!scratch.buffer) {
        return "ggml could not allocate a small buffer: out of memory";
    }
    if (weight->buffer != scratch.buffer || input->buffer != scratch.buffer || weight->extra) {
        return mismatch("buffer");
    }
    if (weight->data != ggml.ggml_backend_buffer_get_base(scratch.buffer) ||
        view->data != static_cast<char *>(input->data) + 16) {
        return mismatch("data");
    }
    if (const char * wrong = check_interfaces(ggml)) {
        return mismatch(wrong);
    }
    return "";
}

} // namespace

const GgmlApi & api() {
    return g_api;
}

bool bound() {
    return g_bound.load(std::memory_order_acquire);
}

std::string bind(const char * libllama_path) {
    Library library;
    if (!library.open(libllama_path)) {
        return std::string("llama.cpp is not loaded from ") + libllama_path;
    }
    GgmlApi found;
    std::string missing;
    const auto resolve = [&](const char * name, auto & target) {
        void * symbol = library.find(name);
        if (!symbol) {
            missing = name;
        }
        static_assert(sizeof(symbol) == sizeof(target), "function pointers have the size of data pointers");
        std::memcpy(&target, &symbol, sizeof(symbol));
    };
#define TT_RESOLVE(result, name, params) resolve(#name, found.name);
    TT_GGML_FUNCTIONS(TT_RESOLVE)
#undef TT_RESOLVE
    resolve(BREAKDOWN_SYMBOL, found.llama_get_memory_breakdown);
    if (!missing.empty()) {
        return "the loaded llama.cpp has no function " + missing +
               "; install the version of llama-cpp-python that tensortier names";
    }
    std::string wrong = check_layout(found);
    if (wrong.empty()) {
        g_api = found;
        g_bound.store(true, std::memory_order_release);
    }
    return wrong;
}

} // namespace tt

int tt_bind(const char * libllama_path, char * error, size_t error_size) {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const std::string wrong = tt::bound() ? std::string() : tt::bind(libllama_path);
    if (error_size > 0) {
        std::snprintf(error, error_size, "%s", wrong.c_str());
    }
    return wrong.empty() ? 0 : 1;
}

const char * tt_ggml_version(void) {
    return tt::GGML_VERSION;
}
