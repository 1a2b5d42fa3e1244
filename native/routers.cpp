#include "routers.h"

#include "backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace tt {
namespace {

constexpr int MOST_STEPS = 64; // from the ids to the router's product: a dozen operations in any architecture
constexpr int TYPE_F32 = 0;

const Tensor * without_views(const Tensor * tensor) {
    const Operations & ops = operations();
    while (tensor && (tensor->op == ops.view || tensor->op == ops.reshape)) {
        tensor = tensor->src[0];
    }
    return tensor;
}

bool is_weight(const Tensor * tensor) {
    return tensor && tensor->op == operations().none && tensor->data && tensor->buffer &&
           tensor->buffer->usage == USAGE_WEIGHTS && api().ggml_backend_buft_is_host(tensor->buffer->buft);
}

// A vector of `n` floats in main memory; empty where the tensor is none.
std::vector<float> floats(const Tensor * tensor, int64_t n) {
    tensor = without_views(tensor);
    if (!is_weight(tensor) || tensor->type != TYPE_F32 || tensor->ne[0] != n || tensor->ne[1] != 1 ||
        tensor->ne[2] != 1) {
        return {};
    }
    std::vector<float> values(static_cast<size_t>(n));
    std::memcpy(values.data(), tensor->data, values.size() * sizeof(float));
    return values;
}

struct Found {
    const Tensor * product = nullptr;
    std::vector<float> bias;
    bool sigmoid = false;
};

// Depth first: scores come first among the operands of all operations between a router and its choice.
bool search(const Tensor * tensor, int64_t experts, int & steps, Found & found) {
    const Operations & ops = operations();
    if (!tensor || ++steps > MOST_STEPS) {
        return false;
    }
    if (tensor->op == ops.mul_mat && is_weight(tensor->src[0]) && tensor->src[0]->ne[1] == experts) {
        found.product = tensor;
        return true;
    }
    if (tensor->op == ops.none) {
        return false;
    }
    for (const Tensor * source : tensor->src) {
        if (source && source != tensor && search(source, experts, steps, found)) {
            if (tensor->op == ops.add && found.bias.empty()) {
                found.bias = floats(tensor->src[1], experts);
            } else if (tensor->op == ops.unary && found.bias.empty()) {
                found.sigmoid = true; // no other function of single scores is in use for routers
            }
            return true;
        }
    }
    return false;
}

} // namespace

Router find_router(const Tensor & product) {
    Router router;
    router.looked_for = true;
    int steps = 0;
    Found found;
    if (!search(product.src[2], product.src[0]->ne[2], steps, found)) {
        return router;
    }
    router.weight = found.product->src[0];
    router.bias = std::move(found.bias);
    router.sigmoid = found.sigmoid && !router.bias.empty(); // it changes no order
    const Tensor * input = without_views(found.product->src[1]);
    if (input->op == operations().mul) {
        router.norm = floats(input->src[1], router.weight->ne[0]);
    }
    router.shares_input = input == without_views(product.src[1]);
    return router;
}

std::vector<float> input_scale(const Router & here, const Router & next) {
    if (!here.shares_input || here.norm.empty() || here.norm.size() != next.norm.size()) {
        return {};
    }
    std::vector<float> scale(here.norm.size());
    for (size_t i = 0; i < scale.size(); ++i) {
        scale[i] = here.norm[i] != 0.0f ? next.norm[i] / here.norm[i] : 0.0f;
    }
    return scale;
}

void rank(const Router & router, std::vector<float> & scores, size_t experts, size_t used,
          std::vector<int32_t> & ranked) {
    std::vector<float> best(experts, -INFINITY), order;
    for (size_t at = 0; at < scores.size(); at += experts) {
        for (size_t e = 0; e < experts; ++e) {
            float & score = scores[at + e];
            score = router.sigmoid ? 1.0f / (1.0f + std::exp(-score)) : score;
            score += router.bias.empty() ? 0.0f : router.bias[e];
        }
        const auto begin = scores.begin() + static_cast<std::ptrdiff_t>(at);
        order.assign(begin, begin + static_cast<std::ptrdiff_t>(experts));
        const auto last_chosen = order.begin() + static_cast<std::ptrdiff_t>(std::min(used, experts) - 1);
        std::nth_element(order.begin(), last_chosen, order.end(), std::greater<float>());
        for (size_t e = 0; e < experts; ++e) {
            best[e] = std::max(best[e], scores[at + e] - *last_chosen);
        }
    }
    ranked.resize(experts);
    std::iota(ranked.begin(), ranked.end(), 0);
    std::stable_sort(ranked.begin(), ranked.end(), [&](int32_t a, int32_t b) {
        return best[static_cast<size_t>(a)] > best[static_cast<size_t>(b)];
    });
}

void Trial::token(double now) {
    const double seconds = now - last_;
    const bool timed = last_ > 0;
    last_ = now;
    if (!timed) {
        return;
    }
    if (decided_) {
        if (++held_ == HOLD) {
            decided_ = false;
            in_turn_ = held_ = 0;
            seconds_[0].clear();
            seconds_[1].clear();
        }
        return;
    }
    if (in_turn_ > 0) {
        seconds_[with_].push_back(seconds);
    }
    if (++in_turn_ < TURN) {
        return;
    }
    in_turn_ = 0;
    with_ = !with_;
    if (std::min(seconds_[0].size(), seconds_[1].size()) >= ENOUGH) {
        const auto median = [](std::vector<double> & values) {
            const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
            std::nth_element(values.begin(), middle, values.end());
            return *middle;
        };
        winner_ = median(seconds_[1]) < WORTH_IT * median(seconds_[0]);
        decided_ = true;
    }
}

} // namespace tt
