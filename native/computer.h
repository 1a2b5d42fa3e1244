// What one backend of ours computes with: backend.cpp has the graph and the weights that every token uses,
// expert_products.cpp the experts.
#pragma once

#include "backend.h"

#include <deque>

namespace tt {

// A row that a kernel wrote beside, and where it belongs.
struct Scattered {
    const char * from;
    char * to;
    size_t nbytes;
};

class Computer {
public:
    Computer() = default;
    Computer(const Computer &) = delete;
    Computer & operator=(const Computer &) = delete;
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
    void forget_graph();
    void run(bool alone = false);
    void wait(double & stalled);
    void hold(Store * store);
    void let_go();
    void give_back_dense(size_t count);
    void use_threads(int count);
    Tensor * keep(const Tensor & tensor);
    Tensor * slots(const Tensor & weight, int group, int part, int segment);
    void whole_product(const Tensor & node, const Weight & weight, const Pass & pass, int segment);
    void guess_next(const Tensor & node, int group);
    char * product_of(const Tensor & node, const Weight & weight, const Pass & pass,
                      const std::vector<size_t> & chosen, char * memory);
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
    uint64_t scratch_bytes_ = 0; // in scratch_
    std::vector<Scattered> scattered_;
    Store * store_ = nullptr; // whose mutex we hold
    std::unique_lock<std::mutex> lock_;
    std::vector<size_t> dense_in_use_;
    std::vector<int32_t> ids_;
    std::vector<int32_t> slot_of_; // [expert]: its slot's number in the segment
    std::vector<int32_t> ranked_;
    std::vector<float> scores_;
};

} // namespace tt
