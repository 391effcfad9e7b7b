// Attention of one head over its slots: what the processor's widest vectors are worth having for.
// The same source is compiled for several instruction sets and chosen when the library is loaded.
#pragma once

#include <cstdint>

namespace ssd_operators {

// What is attended to. key, value: float [num_slots, head_dim]; position: -1 is an empty slot, and
// at least one is not. score: float [num_slots], to which the probabilities of all queries are
// added; null where the head does not rank by it.
struct Slots {
    float* key;
    float* value;
    int32_t* position;
    float* score;
    int num_slots;
};

struct HeadAttention {
    // out [num_queries, head_dim] of queries [num_queries, head_dim], scaled already. scratch:
    // num_slots numbers.
    void (*attend)(Slots const& slots, float const* queries, int num_queries, int head_dim,
                   float* scratch, float* out);
    // The first of the lowest numbers.
    int (*lowest)(int32_t const* numbers, int count);
    char const* name;
};

extern HeadAttention const baseline_attention;
#if defined(SSD_OPERATORS_X86)
extern HeadAttention const avx2_attention;
extern HeadAttention const avx512_attention;
#endif

// The best one that this processor runs.
HeadAttention const& head_attention();

}  // namespace ssd_operators
