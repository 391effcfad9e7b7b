// Attention of one head over its slots. Compiled once for each instruction set, SSD_SET being its
// name. Plain loops that compilers turn into vectors; nothing of the standard library, whose inline
// functions the linker would take from any of the sets.
#include <cstring>

#include "fast_exp.h"
#include "kernels.h"

namespace ssd_operators {
namespace {

constexpr float masked = -3.0e38F;
constexpr float negligible = 0x1p-40F;  // of a head's attention: far below what a sum rounds off
constexpr int ahead = 8;                // value rows that are on their way

// logits -> probabilities over the slots that hold a token, in place. NaN stays NaN.
void softmax(float* logits, int32_t const* position, int count) {
    float greatest = masked;
#pragma omp simd reduction(max : greatest)
    for (int slot = 0; slot < count; ++slot) {
        float const logit = position[slot] < 0 ? masked : logits[slot];
        logits[slot] = logit;
        greatest = logit > greatest ? logit : greatest;
    }
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int slot = 0; slot < count; ++slot) {
        float const weight = position[slot] < 0 ? 0.0F : exp_of(logits[slot] - greatest);
        logits[slot] = weight;
        total += weight;
    }
    float const factor = 1 / total;
    for (int slot = 0; slot < count; ++slot) {
        logits[slot] *= factor;
    }
}

// Begins to fetch a row: memory is the slower part, and it comes as it is asked for.
inline void fetch(float const* row, int width) {
    for (int i = 0; i < width; i += 16) {
        __builtin_prefetch(row + i);
    }
}

// The slots whose values count, in their order. NaN counts.
int heavy_slots(float const* weights, int count, int32_t* heavy) {
    int found = 0;
    for (int slot = 0; slot < count; ++slot) {
        heavy[found] = slot;
        found += weights[slot] < negligible ? 0 : 1;
    }
    return found;
}

// size: the head's width where it is known when this is compiled, so that sums stay in registers.
template <int size>
void attend_of(Slots const& slots, float const* query, int head_dim, int count, float* scratch,
               float* out) {
    int const width = size > 0 ? size : head_dim;
    for (int slot = 0; slot < count; ++slot) {
        float const* key = slots.key + static_cast<int64_t>(slot) * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < width; ++i) {
            sum += key[i] * query[i];
        }
        scratch[slot] = sum;
    }
    softmax(scratch, slots.position, count);
    auto* const heavy = reinterpret_cast<int32_t*>(scratch + slots.num_slots);
    int const num_heavy = heavy_slots(scratch, count, heavy);
    float sums[size > 0 ? size : 1] = {};
    float* const total = size > 0 ? sums : out;
    if (size == 0) {
        std::memset(out, 0, sizeof(float) * static_cast<size_t>(width));
    }
    for (int place = 0; place < num_heavy; ++place) {
        float const* value = slots.value + static_cast<int64_t>(heavy[place]) * width;
        float const weight = scratch[heavy[place]];
        if (place + ahead < num_heavy) {
            fetch(slots.value + static_cast<int64_t>(heavy[place + ahead]) * width, width);
        }
#pragma omp simd
        for (int i = 0; i < width; ++i) {
            total[i] += weight * value[i];
        }
    }
    if (size > 0) {
        std::memcpy(out, sums, sizeof(sums));
    }
}

}  // namespace

namespace SSD_SET {

void attend(Slots const& slots, float const* queries, int num_queries, int head_dim, float* scratch,
            float* out) {
    int count = slots.num_slots;
    while (count > 1 && slots.position[count - 1] < 0) {
        --count;
    }
    auto* const of_width = head_dim == 32    ? attend_of<32>
                           : head_dim == 64  ? attend_of<64>
                           : head_dim == 128 ? attend_of<128>
                                             : attend_of<0>;
    for (int query = 0; query < num_queries; ++query) {
        of_width(slots, queries + query * head_dim, head_dim, count, scratch,
                 out + query * head_dim);
        if (slots.score != nullptr) {
            for (int slot = 0; slot < count; ++slot) {
                slots.score[slot] += scratch[slot];
            }
        }
    }
}

int lowest(int32_t const* numbers, int count) {
    int32_t least = numbers[0];
#pragma omp simd reduction(min : least)
    for (int i = 0; i < count; ++i) {
        least = numbers[i] < least ? numbers[i] : least;
    }
    int place = 0;
    while (numbers[place] != least) {
        ++place;
    }
    return place;
}

void gated_silu(float const* gate_up, int64_t size, float* out) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        float const gate = gate_up[i];
        float const small = exp_of(gate < 0 ? gate : -gate);
        float const sigmoid = (gate < 0 ? small : 1.0F) / (1.0F + small);
        out[i] = gate * sigmoid * gate_up[size + i];
    }
}

}  // namespace SSD_SET
}  // namespace ssd_operators
