// For tests: a drive that ends no read before somebody waits for one, and then one only, in a chosen order.
// Nothing here depends on time, so what goes wrong with it goes wrong each time.
//
// Until a read has ended its memory is filled with what is no number in any format of weights: whoever
// computes with it too early gets no numbers either. What else the memory of a read must not suffer is
// counted.

#include "reader.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace tt {
namespace {

constexpr int UNREAD = 0xFF;

std::atomic<int64_t> misused{0};

bool overlap(const Piece & a, const Piece & b) {
    return a.memory < b.memory + b.length && b.memory < a.memory + a.length;
}

class HeldReader : public PieceReader {
public:
    HeldReader(std::unique_ptr<PieceReader> inner, uint64_t order)
        : inner_(std::move(inner)), order_(order), random_(order) {}
    ~HeldReader() override { misused += static_cast<int64_t>(held_.size()); }

    void start(Piece * const * pieces, size_t count) override {
        for (size_t i = 0; i < count; ++i) {
            for (const Piece * other : held_) {
                misused += overlap(*other, *pieces[i]);
            }
            std::memset(pieces[i]->memory, UNREAD, pieces[i]->length);
            held_.push_back(pieces[i]);
        }
    }

    void harvest(std::vector<Piece *> & ended, int milliseconds) override {
        if (held_.empty() || (milliseconds == 0 && (order_ <= LAST_COME || next_random() % 4 != 0))) {
            return;
        }
        const auto chosen = held_.begin() + static_cast<std::ptrdiff_t>(choose());
        Piece * piece = *chosen;
        held_.erase(chosen);
        misused += std::any_of(piece->memory, piece->memory + piece->length,
                               [](char byte) { return byte != static_cast<char>(UNREAD); });
        inner_->start(&piece, 1);
        const size_t before = ended.size();
        while (ended.size() == before) {
            inner_->harvest(ended, 1000);
        }
        misused += piece->result == -EFAULT;
    }

    const char * name() const override { return inner_->name(); }

private:
    static constexpr uint64_t FIRST_COME = 0;
    static constexpr uint64_t LAST_COME = 1;

    size_t choose() {
        if (order_ == FIRST_COME) {
            return 0;
        }
        return order_ == LAST_COME ? held_.size() - 1 : next_random() % held_.size();
    }
    uint64_t next_random() { // the same numbers each time
        random_ = random_ * 6364136223846793005u + 1442695040888963407u;
        return random_ >> 33;
    }

    std::unique_ptr<PieceReader> inner_;
    const uint64_t order_;
    uint64_t random_;
    std::vector<Piece *> held_; // in the order in which they were asked for
};

} // namespace

std::unique_ptr<PieceReader> make_held_reader(std::unique_ptr<PieceReader> inner, uint64_t order) {
    return std::make_unique<HeldReader>(std::move(inner), order);
}

int64_t reads_misused() {
    return misused;
}

} // namespace tt
