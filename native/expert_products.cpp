// Products of experts on the drive. An expert is computed for all tokens routed to it at once, as the kernel
// does when all experts are in one tensor: how it computes may depend on their number.

#include "computer.h"

#include <algorithm>
#include <cstring>

namespace tt {
namespace {

// Activations gathered at a time, unless one expert alone has more.
constexpr size_t GATHER_BYTES = 4u << 20;
// One thread computes as much at once, for so few tokens, sooner than it could wake the others.
constexpr uint64_t ALONE_BYTES = 4u << 20;
constexpr size_t ALONE_ROWS = 8;
constexpr int64_t GUESS_TOKENS = 4; // more of them use most experts
constexpr int TYPE_F32 = 0;
constexpr int TYPE_I32 = 26;
constexpr int FLAG_COMPUTE = 16;

// Where rows that are computed apart lie: inputs, results, and the slots in the place of their experts.
struct Apart {
    Apart(const Tensor & node, size_t rows)
        : in_bytes(sizeof(float) * static_cast<size_t>(node.src[1]->ne[0])),
          out_bytes(sizeof(float) * static_cast<size_t>(node.ne[0])),
          out(round_up(rows * in_bytes, Reader::CACHE_LINE)),
          ids(out + round_up(rows * out_bytes, Reader::CACHE_LINE)),
          end(ids + round_up(rows * sizeof(int32_t), Reader::CACHE_LINE)) {}
    size_t in_bytes, out_bytes; // of a row
    size_t out, ids, end;       // from the first input on
};

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

} // namespace

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
// belong. Returns the end of the memory that it takes from `memory` on.
char * Computer::product_of(const Tensor & node, const Weight & weight, const Pass & pass,
                            const std::vector<size_t> & chosen, char * memory) {
    size_t rows = 0;
    for (const size_t i : chosen) {
        rows += pass.first[i + 1] - pass.first[i];
    }
    const Tensor & input = *node.src[1];
    const Apart apart(node, rows);
    const size_t in_bytes = apart.in_bytes, out_bytes = apart.out_bytes;
    char * in = memory;
    char * out = memory + apart.out;
    char * ids_memory = memory + apart.ids;
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
    return memory + apart.end;
}

// The next layer's router on this layer's input, while this layer's experts are on their way.
void Computer::guess_next(const Tensor & node, int group) {
    std::vector<Router> & routers = store_->routers;
    const size_t here = static_cast<size_t>(group), next = here + 1;
    if (here >= routers.size()) {
        return;
    }
    if (!routers[here].looked_for) {
        routers[here] = find_router(node);
    }
    if (next == routers.size() || !routers[next].weight || node.src[1]->ne[2] > GUESS_TOKENS ||
        !store_->guessing()) {
        return;
    }
    const Router & router = routers[next];
    const Tensor & input = *node.src[1];
    const size_t width = static_cast<size_t>(router.weight->ne[0]), tokens = static_cast<size_t>(input.ne[2]);
    const size_t n = static_cast<size_t>(router.weight->ne[1]);
    if (input.ne[0] != router.weight->ne[0] || input.type != TYPE_F32) {
        return; // another part of the experts comes first here
    }
    const std::vector<float> scale = input_scale(routers[here], router);
    char * in = scratch(tokens * width * sizeof(float));
    for (size_t token = 0; token < tokens; ++token) {
        float * row = reinterpret_cast<float *>(in) + token * width;
        std::memcpy(row, static_cast<const char *>(input.data) + token * input.nb[2], width * sizeof(float));
        for (size_t i = 0; i < scale.size(); ++i) {
            row[i] *= scale[i];
        }
    }
    scores_.resize(tokens * n);
    Tensor product = f32_tensor(reinterpret_cast<const char *>(scores_.data()), static_cast<int64_t>(n),
                                static_cast<int64_t>(tokens));
    std::swap(product.ne[1], product.ne[2]);
    product.nb[2] = product.nb[3];
    product.op = operations().mul_mat;
    product.flags = FLAG_COMPUTE;
    product.src[0] = const_cast<Tensor *>(router.weight);
    Tensor activations = f32_tensor(in, static_cast<int64_t>(width), static_cast<int64_t>(tokens));
    std::swap(activations.ne[1], activations.ne[2]);
    activations.nb[2] = activations.nb[3];
    product.src[1] = keep(activations);
    add(product);
    run(true);
    const size_t named = std::min(n, store_->used() * tokens);
    rank(router, scores_, n, store_->used(), ranked_);
    ranked_.resize(std::min(n, std::max(named, store_->guesses())));
    experts().guess(group + 1, ranked_, named, store_->guesses());
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
    if (pass.asked.size() == 1) {
        guess_next(*node, group);
    }

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
        size_t gathered = 0, room = 0;
        std::vector<std::vector<size_t>> products; // each of one segment
        std::vector<size_t> done;
        for (size_t k = 0; k < there.size(); ++k) {
            const size_t i = there[k].second;
            const size_t nbytes = (pass.first[i + 1] - pass.first[i]) * row_bytes;
            if (!done.empty() && gathered + nbytes > GATHER_BYTES) {
                break; // the rest in the next round
            }
            if (done.empty() || there[k].first != there[k - 1].first) {
                products.emplace_back();
            }
            gathered += nbytes;
            room += Apart(*node, pass.first[i + 1] - pass.first[i]).end;
            products.back().push_back(i);
            done.push_back(i);
        }
        // as much as a round of this width may take, so that it need not grow from round to round
        char * memory = store_->rows(std::max(room, std::min(GATHER_BYTES, Apart(*node, used * tokens).end)));
        for (const std::vector<size_t> & chosen : products) {
            memory = product_of(*node, weight, pass, chosen, memory);
        }
        run(waited && gathered < ALONE_ROWS * row_bytes && done.size() * one_bytes < ALONE_BYTES);
        for (const size_t i : done) {
            experts().finished(group, part, i);
            left.erase(std::find(left.begin(), left.end(), i));
        }
        store_->reader().poll();
        experts().pump(group, part);
    }
}

} // namespace tt
