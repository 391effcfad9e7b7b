#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "ssd_export/attention_fields.h"
#include "ssd_export/node_kind.h"

namespace ssd_export {

using Pointers = std::array<void const*, kMaxGroups>;

// Arguments of all kernels, named as their parameters (ssd_export/kernels). The constructor sets
// what the node's inputs, fields and sizes say; arrays that a kernel leaves are the launcher's.
struct Arguments {
    explicit Arguments(Launch const& launch);

    void const* query_ptr = nullptr;
    void const* key_ptr = nullptr;
    void const* value_ptr = nullptr;
    void const* position_ptr = nullptr;
    void const* prompt_length_ptr = nullptr;
    void const* active_ptr = nullptr;
    void const* counts_ptr = nullptr;
    Pointers cache_keys{};
    Pointers cache_values{};
    Pointers cache_positions{};
    Pointers cache_scores{};
    void* present_ptr = nullptr;
    void* score_ptr = nullptr;
    void const* logits_ptr = nullptr;
    void* sums_ptr = nullptr;
    void const* largest_ptr = nullptr;
    void const* total_ptr = nullptr;
    void* out_ptr = nullptr;
    int32_t query_stride = 0;
    int32_t key_stride = 0;
    int32_t value_stride = 0;
    int32_t num_splits = 1;
    int32_t num_places = 1;
    int32_t num_heads = 0;
    int32_t query_group_size = 0;
    int32_t grid_width = 0;
    float score_decay = 0;
    int32_t most_slots = 0;
    int32_t kept_slots = 0;
    OfGroups first_heads{};
    OfGroups group_heads{};
    OfGroups group_slots{};
    OfGroups num_sinks{};
    OfGroups num_recent{};
    OfGroups by_score{};
    OfGroups pinned_columns{};
    OfGroups age_quota{};
    OfGroups evict_every{};
    void* scratch = nullptr;  // compiled Triton kernels end with two pointers; these need none
};

template <typename Value>
void add_place(std::vector<void const*>& places, Value const& value) {
    places.push_back(&value);
}

template <typename Value>
void add_place(std::vector<void const*>& places, std::array<Value, kMaxGroups> const& values) {
    for (Value const& value : values) {
        places.push_back(&value);
    }
}

// Where the arguments of a launch are, in order; a head group's one by one.
template <typename... Values>
std::vector<void const*> places_of(Values const&... values) {
    std::vector<void const*> places;
    (add_place(places, values), ...);
    return places;
}

}  // namespace ssd_export
