// What the processor's widest vectors are worth having for. The same sources are compiled for
// several instruction sets, each in a namespace of its name, and chosen when the library is loaded.
#pragma once

#include <cstdint>

#include "codes.h"
#include "group_norm.h"

namespace ssd_operators {

// How the rows of a cache are held (cache_rows.h).
enum class CacheRows { float32, float16, int8 };

// What is attended to. key, value: [num_slots, head_dim]; key_scale, value_scale: float
// [num_slots] of rows in int8, else null; position: -1 is an empty slot, and at least one is not.
// score: float [num_slots], to which the probabilities of all queries are added; null where the
// head does not rank by it.
struct Slots {
    void* key;
    void* value;
    float* key_scale;
    float* value_scale;
    int32_t* position;
    float* score;
    int num_slots;
    CacheRows rows;
};

// cos and sin of RoPE for a row: half a head's numbers each.
struct Angles {
    float const* cos;
    float const* sin;
};

constexpr int most_lanes = 16;  // of any instruction set

// How a constant matrix is held: in two bytes where these have every one of its numbers.
enum class Storage { float16, bfloat16, float32 };

// A matrix [depth, width] in panels of so many columns, each [depth, columns], the last filled up
// with zeros.
struct Panels {
    void const* weights;
    Storage storage;
    int64_t depth, width;
};

// Rows x float [num_rows, depth] times the panels, plus a bias [width] unless it is null, into
// out [num_rows, width].
struct Product {
    float const* x;
    float const* bias;
    float* out;
    int64_t num_rows;
};

// Codes that race to be an image's token: its rows of logits, the second null without guidance.
struct Race {
    float const* conditional;
    float const* unconditional;
    float const* noise;
    float cfg_scale, temperature;
};

struct Kernels {
    // out [num_queries, head_dim] of queries [num_queries, head_dim], scaled already. scratch:
    // 2 * (num_slots + most_lanes) numbers.
    void (*attend)(Slots const& slots, float const* queries, int num_queries, int head_dim,
                   float* scratch, float* out);
    // Writes a row of a cache, and its scale where it has one.
    void (*write_row)(CacheRows rows, float const* row, int head_dim, void* to, float* scale);
    // RoPE of a head, times a factor. half: of its numbers.
    void (*turn)(float const* in, Angles const& angles, int half, float factor, float* out);
    // The first of the lowest numbers.
    int (*lowest)(int32_t const* numbers, int count);
    int (*least)(float const* numbers, int count);
    // out [size] = silu(gate_up[:size]) * gate_up[size:].
    void (*gated_silu)(float const* gate_up, int64_t size, float* out);
    // Columns of a panel.
    int64_t columns;
    // Writes a matrix [depth, width] as panels; false where the storage does not hold it.
    bool (*pack)(float const* matrix, Storage storage, int64_t depth, int64_t width, void* panels);
    // One panel of a product. scratch: depth * columns floats.
    void (*multiply)(Product const& product, Panels const& panels, int64_t panel, float* scratch);
    // Rows times codes that are bound by memory; more are bound by arithmetic.
    int few_rows;
    // Columns of a panel of codes.
    int (*panel_of)(int bits);
    // Rounds a row float [depth] to int8, where it has a place.
    void (*code_row)(float const* x, Codes const& codes, CodedRows const& rows, int64_t row);
    // Adds a part of a product to its sums: as suits few rows, or many.
    void (*multiply_codes)(Codes const& codes, CodedRows const& rows, Part const& part,
                           bool are_few);
    // Writes the parts' columns of a row to out [width]: parts of the same columns, added up, plus
    // bias [width] unless it is null.
    void (*gather_parts)(int bits, Part const* parts, int num_parts, int64_t num_rows, int64_t row,
                         float const* bias, float* out);
    // Gumbel noise float [num_codes] of an image's step (ssd_export/noise.py).
    void (*fill_noise)(uint64_t seed, uint32_t image, uint32_t step, int64_t num_codes,
                       float* noise);
    // The first of the codes that win. scratch: num_codes floats.
    int64_t (*draw)(Race const& race, int64_t num_codes, float* scratch);
    // totals [2, channels]: sums of number - pivot and of its square over num_places; pivot
    // [channels]. Writes the numbers to kept, unless it is null.
    void (*measure)(Feature const& feature, int64_t num_places, int channels, float const* pivot,
                    float* kept, float* totals);
    // Writes num_places to out, float or uint8.
    void (*finish)(Feature const& feature, int64_t num_places, int channels, Finish const& how,
                   void* out);
    char const* name;
};

#define SSD_DECLARE_CODES(set)                                                        \
    namespace set {                                                                   \
    int few_rows();                                                                   \
    int panel_of(int);                                                                \
    void code_row(float const*, Codes const&, CodedRows const&, int64_t);             \
    void multiply_codes(Codes const&, CodedRows const&, Part const&, bool);           \
    void gather_parts(int, Part const*, int, int64_t, int64_t, float const*, float*); \
    }
#define SSD_DECLARE_KERNELS(set)                                              \
    namespace set {                                                           \
    void attend(Slots const&, float const*, int, int, float*, float*);        \
    void write_row(CacheRows, float const*, int, void*, float*);              \
    void turn(float const*, Angles const&, int, float, float*);               \
    int lowest(int32_t const*, int);                                          \
    int least(float const*, int);                                             \
    void gated_silu(float const*, int64_t, float*);                           \
    int64_t panel_columns();                                                  \
    bool pack(float const*, Storage, int64_t, int64_t, void*);                \
    void multiply(Product const&, Panels const&, int64_t, float*);            \
    void fill_noise(uint64_t, uint32_t, uint32_t, int64_t, float*);           \
    int64_t draw(Race const&, int64_t, float*);                               \
    void measure(Feature const&, int64_t, int, float const*, float*, float*); \
    void finish(Feature const&, int64_t, int, Finish const&, void*);          \
    }
SSD_DECLARE_KERNELS(baseline)
SSD_DECLARE_CODES(baseline)
#if defined(SSD_OPERATORS_X86)
SSD_DECLARE_KERNELS(avx2)
SSD_DECLARE_KERNELS(avx512)
SSD_DECLARE_CODES(avx2)
SSD_DECLARE_CODES(avxvnni)
SSD_DECLARE_CODES(avx512)
SSD_DECLARE_CODES(avx512vnni)
SSD_DECLARE_CODES(avx512amx)
#endif

// The best ones that this processor runs.
Kernels const& kernels();

}  // namespace ssd_operators
