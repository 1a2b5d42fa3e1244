// Which experts the next layer will use, guessed: its router applied to what this layer's experts are given.
// The two inputs differ by what one layer adds, so most of the guess is often right.
//
// The routers' weights are the model's own, found by following the graph back from the ids that the experts
// of a layer are chosen by. Where there is no router in the graph (ids that come from a table, or from
// another device), there is no guess.
#pragma once

#include "ggml_interfaces.h"

#include <vector>

namespace tt {

struct Router {
    bool looked_for = false;
    const Tensor * weight = nullptr; // [input, experts] in main memory; null: not known
    std::vector<float> norm;         // weight of the norm that its input comes out of; empty: none
    std::vector<float> bias;         // of the scores; empty: none
    bool sigmoid = false;            // of the scores, before the bias
    bool shares_input = false;       // the experts are given what the router is given
};

// The router that `product`, a MUL_MAT_ID, has its ids from.
Router find_router(const Tensor & product);

// What has to be multiplied with the input of one layer's experts to become the next router's input, but for
// what the layer adds; empty where that is nothing.
std::vector<float> input_scale(const Router & here, const Router & next);

// Experts by falling score, for a few tokens together: an expert counts by the best it does for any of them.
// `scores`: [token][expert], overwritten.
void rank(const Router & router, std::vector<float> & scores, size_t experts, size_t used,
          std::vector<int32_t> & ranked);

// Whether to guess at all, decided by measurement: some tokens with guesses and some without, in turn; then a
// long time the faster way.
class Trial {
public:
    bool guessing() const { return decided_ ? winner_ : with_; }
    // A token's pass began at this time, in seconds.
    void token(double now);
    // Something else than single tokens was computed.
    void interrupted() { last_ = 0; }

private:
    static constexpr size_t TURN = 6;        // tokens; the first of each is not counted
    static constexpr size_t ENOUGH = 30;     // counted tokens of each way
    static constexpr size_t HOLD = 1000;     // tokens until the next trial
    static constexpr double WORTH_IT = 0.98; // of the time without

    bool decided_ = false, winner_ = false, with_ = true;
    size_t in_turn_ = 0, held_ = 0;
    double last_ = 0;
    std::vector<double> seconds_[2]; // without, with
};

} // namespace tt
