// How our backend computes: it puts what was read in the place of each paged weight and lets the inner
// backend's own kernels do the rest, so results are those of the inner backend to the last bit.
//
// Nodes are gathered into a graph of the inner backend as long as nothing has to be waited for; a wait first
// computes what is there. An expert is computed for all tokens routed to it at once, as the kernel does when
// all experts are in one tensor: how it computes may depend on their number.

#include "backend.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>

namespace tt {
namespace {

constexpr size_t GRAPH_NODES = 2048;
constexpr int WAIT_MILLISECONDS = 50; // then look whether the user wants to stop
// Activations gathered at a time, unless one expert alone has more.
constexpr size_t GATHER_BYTES = 4u << 20;
// One thread computes as much at once, for so few tokens, sooner than it could wake the others.
constexpr uint64_t ALONE_BYTES = 4u << 20;
constexpr size_t ALONE_ROWS = 8;
constexpr int STATUS_ABORTED = 1;
constexpr int TYPE_F32 = 0;
constexpr int TYPE_I32 = 26;
constexpr int FLAG_COMPUTE = 16;
constexpr uint8_t GUID[16] = {0x54, 0x45, 0x4e, 0x53, 0x4f, 0x52, 0x54, 0x49,
                              0x45, 0x52, 0x2d, 0x54, 0x49, 0x45, 0x52, 0x31};

class Aborted {};

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename Function> Function inner_function(const char * name) {
    Registry * registry = api().ggml_backend_dev_backend_reg(inner_device());
    void * symbol = api().ggml_backend_reg_get_proc_address(registry, name);
    Function function = nullptr;
    std::memcpy(&function, &symbol, sizeof(symbol));
    return function;
}

// A row that a kernel wrote beside, and where it belongs.
struct Scattered {
    const char * from;
    char * to;
    size_t nbytes;
};

class Computer {
public:
    ~Computer() {
        if (inner_) {
            api().ggml_backend_free(inner_);
        }
        if (context_) {
            api().ggml_free(context_);
        }
    }

    int threads = 0;
    bool (*abort_callback)(void * data) = nullptr;
    void * abort_data = nullptr;

    int compute(Graph * graph);
    void configure(); // after threads or abort_callback have changed

private:
    void start();
    void node(Tensor * node);
    void expert_product(Tensor * node, const Weight & weight);
    void with_dense(Tensor * node);
    void add(const Tensor & node);
    void run(bool alone = false);
    void wait(double & stalled);
    void hold(Store * store);
    void let_go();
    void give_back_dense();
    void use_threads(int count);
    Tensor * keep(const Tensor & tensor);
    Tensor * slots(const Tensor & weight, int group, int part, int segment);
    void whole_product(const Tensor & node, const Weight & weight, const Pass & pass, int segment);
    void product_of(const Tensor & node, const Weight & weight, const Pass & pass,
                    const std::vector<size_t> & chosen);
    char * scratch(size_t nbytes);
    ExpertCache & experts() { return *store_->experts(); }

    Backend * inner_ = nullptr;
    void (*set_threads_)(Backend *, int) = nullptr;
    int threads_in_use_ = 0;
    Context * context_ = nullptr;
    Graph * graph_ = nullptr;
    size_t nodes_ = 0;           // in graph_
    std::deque<Tensor> tensors_; // that live until the graph was computed
    std::deque<std::vector<char>> scratch_;
    std::vector<Scattered> scattered_;
    Store * store_ = nullptr; // whose mutex we hold
    std::unique_lock<std::mutex> lock_;
    std::vector<size_t> dense_in_use_;
    std::vector<int32_t> ids_;
    std::vector<int32_t> slot_of_; // [expert]: its slot's number in the segment
};

void Computer::start() {
    if (inner_) {
        return;
    }
    inner_ = api().ggml_backend_dev_init(inner_device(), nullptr);
    const size_t bytes = api().ggml_graph_overhead_custom(GRAPH_NODES, false) + api().ggml_tensor_overhead();
    context_ = api().ggml_init({bytes, nullptr, true});
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
        }
    } catch (const std::exception & error) {
        status = STATUS_FAILED;
        if (store_) {
            store_->failed(error.what());
        }
    }
    if (nodes_ > 0) { // given up in the middle
        api().ggml_graph_clear(graph_);
        nodes_ = 0;
        tensors_.clear();
        scratch_.clear();
        scattered_.clear();
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
    give_back_dense();
    store_ = nullptr;
    lock_.unlock();
}

void Computer::give_back_dense() {
    for (const size_t id : dense_in_use_) {
        store_->dense()->give_back(id);
    }
    dense_in_use_.clear();
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

// Computes what was gathered; `alone`, without the other threads: to wake them takes longer than what they
// would save on a little work.
void Computer::run(bool alone) {
    if (nodes_ == 0) {
        return;
    }
    use_threads(alone ? 1 : threads);
    const int status = api().ggml_backend_graph_compute(inner_, graph_);
    if (status == STATUS_SUCCESS) {
        for (const Scattered & row : scattered_) {
            std::memcpy(row.to, row.from, row.nbytes);
        }
    }
    api().ggml_graph_clear(graph_);
    nodes_ = 0;
    tensors_.clear();
    scratch_.clear();
    scattered_.clear();
    if (status == STATUS_ABORTED) {
        throw Aborted();
    }
    if (status != STATUS_SUCCESS) {
        throw ReadError("the CPU backend failed to compute");
    }
}

void Computer::wait(double & stalled) {
    run();
    const double before = seconds();
    store_->reader().wait(WAIT_MILLISECONDS);
    stalled += seconds() - before;
    if (abort_callback && abort_callback(abort_data)) {
        throw Aborted();
    }
}

char * Computer::scratch(size_t nbytes) {
    scratch_.emplace_back(nbytes);
    return scratch_.back().data();
}

// --- weights that every token uses

void Computer::with_dense(Tensor * node) {
    Tensor copy = *node;
    DenseStore & dense = *store_->dense();
    for (Tensor *& source : copy.src) {
        if (!source || !is_paged(source)) {
            continue;
        }
        const Tensor * origin = source->view_src ? source->view_src : source;
        const Weight & weight = *static_cast<const Weight *>(origin->extra);
        bool full = false;
        char * data = dense.acquire(weight.dense, full);
        while (!data) {
            if (full) { // those of earlier nodes have to be computed first
                if (dense_in_use_.empty()) {
                    throw ReadError("the ring for weights is too small for one operation");
                }
                run();
                give_back_dense();
            } else {
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

// --- experts

// A tensor of all slots of a segment: expert number n of it is what is in slot n.
Tensor * Computer::slots(const Tensor & weight, int group, int part, int segment) {
    const Segment & seg = experts().segment(segment);
    Tensor tensor = weight;
    tensor.buffer = nullptr;
    tensor.extra = nullptr;
    tensor.data = seg.base + experts().offset_in_slot(group, part, segment);
    tensor.ne[2] = seg.count;
    tensor.nb[2] = seg.stride;
    tensor.nb[3] = seg.stride * static_cast<size_t>(seg.count);
    return keep(tensor);
}

Tensor f32_tensor(const char * data, int64_t ne0, int64_t ne2) {
    Tensor tensor{};
    tensor.type = TYPE_F32;
    tensor.ne[0] = ne0;
    tensor.ne[1] = 1;
    tensor.ne[2] = ne2;
    tensor.ne[3] = 1;
    tensor.nb[0] = sizeof(float);
    tensor.nb[1] = tensor.nb[2] = sizeof(float) * static_cast<size_t>(ne0);
    tensor.nb[3] = tensor.nb[2] * static_cast<size_t>(ne2);
    tensor.data = const_cast<char *>(data);
    return tensor;
}

// All experts of the pass are in one segment: the node as it is, with slots for experts.
void Computer::whole_product(const Tensor & node, const Weight & weight, const Pass & pass, int segment) {
    Tensor copy = node;
    copy.src[0] = slots(*weight.tensor, weight.group, weight.part, segment);
    char * memory = scratch(pass.ids.size() * sizeof(int32_t));
    for (size_t k = 0; k < pass.ids.size(); ++k) {
        const int32_t slot = slot_of_[static_cast<size_t>(pass.ids[k])];
        std::memcpy(memory + k * sizeof(int32_t), &slot, sizeof(slot));
    }
    Tensor ids = *node.src[2];
    ids.buffer = nullptr;
    ids.view_src = nullptr;
    ids.view_offs = 0;
    ids.op = operations().none;
    ids.data = memory;
    ids.nb[0] = sizeof(int32_t);
    ids.nb[1] = sizeof(int32_t) * static_cast<size_t>(ids.ne[0]);
    ids.nb[2] = ids.nb[3] = ids.nb[1] * static_cast<size_t>(ids.ne[1]);
    copy.src[2] = keep(ids);
    add(copy);
}

// Some experts, all in one segment: their rows are gathered, computed beside, and scattered to where they
// belong.
void Computer::product_of(const Tensor & node, const Weight & weight, const Pass & pass,
                          const std::vector<size_t> & chosen) {
    size_t rows = 0;
    for (const size_t i : chosen) {
        rows += pass.first[i + 1] - pass.first[i];
    }
    const Tensor & input = *node.src[1];
    const size_t in_bytes = sizeof(float) * static_cast<size_t>(input.ne[0]);
    const size_t out_bytes = sizeof(float) * static_cast<size_t>(node.ne[0]);
    char * in = scratch(rows * in_bytes);
    char * out = scratch(rows * out_bytes);
    char * ids_memory = scratch(rows * sizeof(int32_t));
    int segment = 0;
    size_t row = 0;
    for (const size_t i : chosen) {
        const Slot & slot = *experts().arrived(weight.group, weight.part, i);
        segment = slot.segment;
        for (size_t k = pass.first[i]; k < pass.first[i + 1]; ++k, ++row) {
            const size_t token = static_cast<size_t>(pass.routed[k].token);
            const size_t use = static_cast<size_t>(pass.routed[k].use);
            const size_t source = use % static_cast<size_t>(input.ne[1]);
            std::memcpy(in + row * in_bytes,
                        static_cast<const char *>(input.data) + source * input.nb[1] + token * input.nb[2],
                        in_bytes);
            std::memcpy(ids_memory + row * sizeof(int32_t), &slot.index, sizeof(int32_t));
            scattered_.push_back({out + row * out_bytes,
                                  static_cast<char *>(node.data) + use * node.nb[1] + token * node.nb[2],
                                  out_bytes});
        }
    }
    Tensor ids{};
    ids.type = TYPE_I32;
    ids.ne[0] = 1;
    ids.ne[1] = static_cast<int64_t>(rows);
    ids.ne[2] = ids.ne[3] = 1;
    ids.nb[0] = ids.nb[1] = sizeof(int32_t);
    ids.nb[2] = ids.nb[3] = sizeof(int32_t) * rows;
    ids.data = ids_memory;
    Tensor product = f32_tensor(out, node.ne[0], static_cast<int64_t>(rows));
    product.op = node.op;
    std::copy(std::begin(node.op_params), std::end(node.op_params), product.op_params);
    product.flags = FLAG_COMPUTE;
    product.src[0] = slots(*weight.tensor, weight.group, weight.part, segment);
    product.src[1] = keep(f32_tensor(in, input.ne[0], static_cast<int64_t>(rows)));
    product.src[2] = keep(ids);
    add(product);
}

void Computer::expert_product(Tensor * node, const Weight & weight) {
    const int group = weight.group, part = weight.part;
    const Tensor & ids = *node->src[2];
    const size_t used = static_cast<size_t>(ids.ne[0]), tokens = static_cast<size_t>(ids.ne[1]);
    ids_.resize(used * tokens);
    for (size_t token = 0; token < tokens; ++token) {
        for (size_t use = 0; use < used; ++use) {
            int32_t & id = ids_[token * used + use];
            std::memcpy(&id, static_cast<const char *>(ids.data) + token * ids.nb[1] + use * ids.nb[0],
                        sizeof(id));
            if (id < 0 || id >= weight.shape[2]) {
                throw ReadError(std::string("the router chose an expert that is not there: ") + node->name);
            }
        }
    }
    if (ids_.empty()) {
        return;
    }
    if (!experts().same_pass(group, part, ids_)) {
        run(); // its slots may be given to others now
    }
    const Pass & pass = experts().begin(group, part, ids_, static_cast<int>(tokens), static_cast<int>(used));
    store_->reader().poll();

    const size_t n = pass.experts.size();
    std::vector<size_t> left(n);
    for (size_t i = 0; i < n; ++i) {
        left[i] = i;
    }
    slot_of_.resize(static_cast<size_t>(weight.shape[2]));
    bool alone = false;  // something of this product was computed apart from the rest
    bool waited = false; // for the drive: the other threads are asleep by now
    const uint64_t one_bytes = weight.nbytes / static_cast<uint64_t>(weight.shape[2]);
    while (!left.empty()) {
        // those that are there, by segment
        std::vector<std::pair<int, size_t>> there;
        for (const size_t i : left) {
            if (const Slot * slot = experts().arrived(group, part, i)) {
                there.emplace_back(slot->segment, i);
                slot_of_[static_cast<size_t>(pass.experts[i])] = slot->index;
            }
        }
        if (there.empty()) {
            wait(experts().totals(group).stall_seconds);
            waited = true;
            experts().pump(group, part);
            continue;
        }
        std::stable_sort(there.begin(), there.end(),
                         [](const auto & a, const auto & b) { return a.first < b.first; });
        if (!alone && there.size() == n && there.front().first == there.back().first) {
            whole_product(*node, weight, pass, there.front().first);
            for (const size_t i : left) {
                experts().finished(group, part, i);
            }
            return;
        }
        alone = true;
        run(); // what the rows to be gathered come from
        const size_t row_bytes = sizeof(float) * static_cast<size_t>(node->ne[0] + node->src[1]->ne[0]);
        size_t gathered = 0, scratch_used = 0;
        std::vector<size_t> chosen;
        std::vector<size_t> done;
        for (size_t k = 0; k < there.size(); ++k) {
            const size_t i = there[k].second;
            const size_t nbytes = (pass.first[i + 1] - pass.first[i]) * row_bytes;
            if (!done.empty() && gathered + nbytes > GATHER_BYTES) {
                break; // the rest in the next round
            }
            if (!chosen.empty() && there[k].first != there[k - 1].first) {
                product_of(*node, weight, pass, chosen);
                chosen.clear();
            }
            gathered += nbytes;
            scratch_used = gathered;
            chosen.push_back(i);
            done.push_back(i);
        }
        product_of(*node, weight, pass, chosen);
        store_->scratch_bytes = std::max<uint64_t>(store_->scratch_bytes, scratch_used);
        run(waited && gathered < ALONE_ROWS * row_bytes && done.size() * one_bytes < ALONE_BYTES);
        for (const size_t i : done) {
            experts().finished(group, part, i);
            left.erase(std::find(left.begin(), left.end(), i));
        }
        store_->reader().poll();
        experts().pump(group, part);
    }
}

// --- ggml's view of it

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
