// How our backend computes: it puts what was read in the place of each paged weight and lets the inner
// backend's own kernels do the rest, so results are those of the inner backend to the last bit.
//
// Nodes are gathered into a graph of the inner backend as long as nothing has to be waited for; a wait first
// computes what is there.

#include "computer.h"

#include <algorithm>
#include <cstring>

namespace tt {
namespace {

constexpr size_t GRAPH_NODES = 2048;
constexpr int WAIT_MILLISECONDS = 50; // then look whether the user wants to stop
constexpr int STATUS_ABORTED = 1;
constexpr uint8_t GUID[16] = {0x54, 0x45, 0x4e, 0x53, 0x4f, 0x52, 0x54, 0x49,
                              0x45, 0x52, 0x2d, 0x54, 0x49, 0x45, 0x52, 0x31};

class Aborted {};

template <typename Function> Function inner_function(const char * name) {
    Registry * registry = api().ggml_backend_dev_backend_reg(inner_device());
    void * symbol = api().ggml_backend_reg_get_proc_address(registry, name);
    Function function = nullptr;
    std::memcpy(&function, &symbol, sizeof(symbol));
    return function;
}

} // namespace

void Computer::start() {
    if (graph_) {
        return;
    }
    inner_ = inner_ ? inner_ : api().ggml_backend_dev_init(inner_device(), nullptr);
    const size_t bytes = api().ggml_graph_overhead_custom(GRAPH_NODES, false) + api().ggml_tensor_overhead();
    context_ = context_ ? context_ : api().ggml_init({bytes, nullptr, true});
    if (!inner_ || !context_) {
        throw std::bad_alloc();
    }
    graph_ = api().ggml_new_graph_custom(context_, GRAPH_NODES, false);
    configure();
}

void Computer::configure() {
    if (!inner_) {
        return; // start() comes back here
    }
    set_threads_ = inner_function<void (*)(Backend *, int)>("ggml_backend_set_n_threads");
    threads_in_use_ = 0;
    use_threads(threads);
    using Set = void (*)(Backend *, bool (*)(void *), void *);
    if (const auto set = inner_function<Set>("ggml_backend_set_abort_callback")) {
        set(inner_, abort_callback, abort_data);
    }
}

void Computer::use_threads(int count) {
    if (set_threads_ && count > 0 && count != threads_in_use_) {
        set_threads_(inner_, count);
        threads_in_use_ = count;
    }
}

int Computer::compute(Graph * graph) {
    int status = STATUS_SUCCESS;
    try {
        start();
        const int n = api().ggml_graph_n_nodes(graph);
        for (int i = 0; i < n; ++i) {
            node(api().ggml_graph_node(graph, i));
        }
        run();
    } catch (const Aborted &) {
        status = STATUS_ABORTED;
    } catch (const std::bad_alloc &) {
        status = STATUS_ALLOC_FAILED;
        if (store_) {
            store_->failed("out of memory beside the weights on the drive");
            dense_in_use_.clear(); // the store has forgotten them
        }
    } catch (const std::exception & error) {
        status = STATUS_FAILED;
        if (store_) {
            store_->failed(error.what());
            dense_in_use_.clear();
        }
    }
    if (status != STATUS_SUCCESS && graph_) { // given up in the middle
        forget_graph();
    }
    let_go();
    return status;
}

void Computer::hold(Store * store) {
    if (store_ == store) {
        return;
    }
    if (store_) {
        run();
        let_go();
    }
    lock_ = std::unique_lock<std::mutex>(store->mutex);
    store_ = store;
}

void Computer::let_go() {
    if (!store_) {
        return;
    }
    give_back_dense(dense_in_use_.size());
    store_ = nullptr;
    lock_.unlock();
}

// The first `count` of the weights in use: their nodes have been computed.
void Computer::give_back_dense(size_t count) {
    for (size_t i = 0; i < count; ++i) {
        store_->dense()->give_back(dense_in_use_[i]);
    }
    dense_in_use_.erase(dense_in_use_.begin(), dense_in_use_.begin() + static_cast<std::ptrdiff_t>(count));
}

void Computer::node(Tensor * node) {
    const Weight * weight = nullptr;
    for (const Tensor * source : node->src) {
        if (source && is_paged(source)) {
            const Tensor * origin = source->view_src ? source->view_src : source;
            weight = static_cast<const Weight *>(origin->extra);
            hold(weight->store);
            break;
        }
    }
    const Operations & ops = operations();
    if (node->op == ops.none || node->op == ops.view || node->op == ops.reshape || node->op == ops.permute ||
        node->op == ops.transpose) {
        return; // nothing to compute
    }
    if (!weight) {
        add(*node);
    } else if (weight->kind == Weight::Kind::expert) {
        if (node->op != ops.mul_mat_id || node->src[0] != weight->tensor) {
            throw ReadError(std::string("experts on the drive are not used by a product alone: ") +
                            node->name);
        }
        expert_product(node, *weight);
    } else {
        with_dense(node);
    }
}

Tensor * Computer::keep(const Tensor & tensor) {
    tensors_.push_back(tensor);
    return &tensors_.back();
}

void Computer::add(const Tensor & node) {
    if (nodes_ == GRAPH_NODES) {
        run();
    }
    api().ggml_graph_add_node(graph_, keep(node));
    ++nodes_;
}

void Computer::forget_graph() {
    api().ggml_graph_clear(graph_);
    nodes_ = 0;
    tensors_.clear();
    scratch_.clear();
    scratch_bytes_ = 0;
    scattered_.clear();
}

// Computes what was gathered; `alone`, without the other threads: to wake them takes longer than what they
// would save on a little work.
void Computer::run(bool alone) {
    if (nodes_ == 0) {
        return;
    }
    use_threads(alone ? 1 : threads);
    const double before = clock_seconds();
    const int status = api().ggml_backend_graph_compute(inner_, graph_);
    if (store_) {
        store_->reader().timeline.add(Event::What::compute, before);
    }
    if (status == STATUS_SUCCESS) {
        for (const Scattered & row : scattered_) {
            std::memcpy(row.to, row.from, row.nbytes);
        }
    }
    forget_graph();
    if (status == STATUS_ABORTED) {
        throw Aborted();
    }
    if (status != STATUS_SUCCESS) {
        throw ReadError("the CPU backend failed to compute");
    }
}

void Computer::wait(double & stalled) {
    run();
    const double before = clock_seconds();
    store_->reader().wait(WAIT_MILLISECONDS);
    stalled += clock_seconds() - before;
    store_->reader().timeline.add(Event::What::wait, before);
    if (abort_callback && abort_callback(abort_data)) {
        throw Aborted();
    }
}

char * Computer::scratch(size_t nbytes) {
    scratch_.emplace_back(nbytes);
    scratch_bytes_ += nbytes;
    store_->scratch_beside(scratch_bytes_);
    return scratch_.back().data();
}

// --- weights that every token uses

void Computer::with_dense(Tensor * node) {
    Tensor copy = *node;
    DenseStore & dense = *store_->dense();
    size_t earlier = dense_in_use_.size(); // weights of nodes before this one
    for (Tensor *& source : copy.src) {
        if (!source || !is_paged(source)) {
            continue;
        }
        const Tensor * origin = source->view_src ? source->view_src : source;
        const Weight & weight = *static_cast<const Weight *>(origin->extra);
        bool full = false;
        char * data = dense.acquire(weight.dense, full);
        while (!data) {
            if (full && earlier == 0) {
                throw ReadError("the ring for weights is too small for one operation");
            }
            run(); // what was gathered goes first, and its weights leave: their place is read into meanwhile
            give_back_dense(earlier);
            earlier = 0;
            if (!full) {
                wait(dense.totals().stall_seconds);
            }
            data = dense.acquire(weight.dense, full);
        }
        dense_in_use_.push_back(weight.dense);
        Tensor loaded = *source;
        loaded.data = data + (source->view_src ? source->view_offs : 0);
        loaded.buffer = nullptr;
        loaded.extra = nullptr;
        loaded.view_src = nullptr;
        source = keep(loaded);
    }
    add(copy);
}

// --- ggml's view of it

namespace {

Computer & computer(Backend * backend) {
    return *static_cast<Computer *>(backend->context);
}

const char * backend_name(Backend *) {
    return "TIER";
}

void free_backend(Backend * backend) {
    delete &computer(backend);
    delete backend;
}

int graph_compute(Backend * backend, Graph * graph) {
    return computer(backend).compute(graph);
}

} // namespace

Backend * make_backend(Device * device) {
    auto made = std::make_unique<Backend>();
    *made = Backend{};
    made->guid = &GUID;
    made->iface.get_name = backend_name;
    made->iface.free = free_backend;
    made->iface.graph_compute = graph_compute;
    made->device = device;
    made->context = new Computer();
    return made.release();
}

void set_threads(Backend * backend, int threads) {
    computer(backend).threads = threads;
    computer(backend).configure();
}

void set_abort_callback(Backend * backend, bool (*callback)(void * data), void * data) {
    computer(backend).abort_callback = callback;
    computer(backend).abort_data = data;
    computer(backend).configure();
}

} // namespace tt
