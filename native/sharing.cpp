#include "sharing.h"

#include "reader.h"

#include <algorithm>

namespace tt {
namespace {

// Enough under way for a drive to be busy while what has arrived is computed.
constexpr uint64_t PASSING_BYTES = 24u << 20;
constexpr uint64_t PASSING_SHARE = 8; // but no more than this part of the memory

} // namespace

SlotLayout lay_out(const GroupSpec & group, const std::function<uint64_t(int file)> & sector_of) {
    SlotLayout layout;
    size_t at = 0;
    for (size_t p = 0; p < group.parts.size(); ++p) {
        const PartSpec & part = group.parts[p];
        const uint64_t sector = sector_of(part.file);
        layout.offset[p] = at;
        layout.lead[p] = part.offset % sector;
        uint64_t area = layout.lead[p] + part.nbytes;
        for (int e = 0; e < group.experts; ++e) {
            const uint64_t begin = part.offset + static_cast<uint64_t>(e) * part.nbytes;
            area = std::max(area, round_up(begin + part.nbytes, sector) - begin / sector * sector);
        }
        area = round_up(area, std::max(sector, Reader::CACHE_LINE));
        layout.largest_area = std::max<size_t>(layout.largest_area, area);
        at += area;
    }
    layout.slot_bytes = at;
    return layout;
}

Shares share_out(const std::vector<GroupSpec> & groups, const std::vector<SlotLayout> & layouts,
                 const CacheOptions & options) {
    const bool global = options.policy == PolicyKind::global_lru;
    Shares shares;
    size_t most_parts = 0;
    uint64_t one_each = 0, everything = 0;
    int total_experts = 0, most_experts = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
        shares.largest_slot = std::max(shares.largest_slot, layouts[g].slot_bytes);
        shares.passing_bytes = std::max(shares.passing_bytes, layouts[g].largest_area);
        most_parts = std::max(most_parts, groups[g].parts.size());
        most_experts = std::max(most_experts, groups[g].experts);
        one_each += layouts[g].slot_bytes;
        everything += layouts[g].slot_bytes * static_cast<uint64_t>(groups[g].experts);
        total_experts += groups[g].experts;
    }
    const uint64_t largest_part = shares.passing_bytes;
    const uint64_t used = static_cast<uint64_t>(std::min(options.used, most_experts));
    if (options.bytes < shares.largest_slot * used) {
        throw ReadError("the experts of one token in one layer take " +
                        std::to_string(shares.largest_slot * used) + " bytes; the cache has only " +
                        std::to_string(options.bytes));
    }
    if (options.bytes >= everything && !global) {
        for (const GroupSpec & group : groups) {
            shares.capacity.push_back(group.experts);
        }
        return shares;
    }
    // Enough for the drive to be busy; and for what a token misses, where that may not stay.
    uint64_t passing =
        std::max<uint64_t>(std::min(PASSING_BYTES, options.bytes / PASSING_SHARE) / largest_part, 2);
    const uint64_t of_a_token = used * most_parts;
    if (options.policy != PolicyKind::lru) {
        passing = std::max(passing, std::min(of_a_token, options.bytes / 2 / largest_part));
    }
    passing = std::min(passing, options.bytes / largest_part);
    uint64_t left = options.bytes - passing * largest_part;
    if (global) {
        const uint64_t room =
            std::min<uint64_t>(left / shares.largest_slot, static_cast<uint64_t>(total_experts));
        shares.capacity.push_back(static_cast<int>(room));
        shares.passing = static_cast<int>(passing);
        return shares;
    }
    const uint64_t each = std::min<uint64_t>(left / one_each, static_cast<uint64_t>(most_experts));
    std::vector<int> & count = shares.capacity;
    for (size_t g = 0; g < groups.size(); ++g) {
        count.push_back(std::min(static_cast<int>(each), groups[g].experts));
        left -= static_cast<uint64_t>(count[g]) * layouts[g].slot_bytes;
    }
    for (size_t g = 0; g < groups.size(); ++g) { // one more for as many as there is room for
        if (count[g] < groups[g].experts && left >= layouts[g].slot_bytes) {
            ++count[g];
            left -= layouts[g].slot_bytes;
        }
    }
    // too few of their own for a token: what is left over helps the rest of its experts to pass
    const uint64_t least = static_cast<uint64_t>(*std::min_element(count.begin(), count.end()));
    if (least < used) {
        passing = std::max(passing, std::min((used - least) * most_parts, passing + left / largest_part));
    }
    shares.passing = static_cast<int>(passing);
    return shares;
}

} // namespace tt
