// How the memory for experts is shared out: what one expert takes, and how many of each layer there is room
// for. Arithmetic only, so that it can be asked for budgets that are not here.
#pragma once

#include "policy.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace tt {

inline constexpr size_t MAX_PARTS = 4;

struct PartSpec {
    int file = 0;
    uint64_t offset = 0; // of expert 0; the others follow
    uint64_t nbytes = 0; // of one expert
};
struct GroupSpec {
    int experts = 0;
    std::vector<PartSpec> parts;
};

// A slot for one expert of a group: its parts one after another, each in whole sectors.
struct SlotLayout {
    size_t slot_bytes = 0;
    std::array<size_t, MAX_PARTS> offset{}; // of the part's area in the slot
    std::array<size_t, MAX_PARTS> lead{};   // of the data in the area, the same for all experts
    size_t largest_area = 0;
};
// `sector`: of each file, the granularity of reads.
SlotLayout lay_out(const GroupSpec & group, const std::function<uint64_t(int file)> & sector);

struct CacheOptions {
    PolicyKind policy = PolicyKind::lru;
    std::vector<double> frequency; // for the fixed policy: [group][most experts of a group]
    uint64_t bytes = 0;            // of all slots
    int used = 1;                  // experts that a token uses in a layer
};

struct Shares {
    std::vector<int> capacity; // experts that stay: per group, or one number for all
    int passing = 0;           // slots of single parts, for what does not stay, or is read ahead
    size_t passing_bytes = 0;  // of one of these
    size_t largest_slot = 0;
};

// ReadError where `options.bytes` cannot hold the experts of one token.
Shares share_out(const std::vector<GroupSpec> & groups, const std::vector<SlotLayout> & layouts,
                 const CacheOptions & options);

} // namespace tt
