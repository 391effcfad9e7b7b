// Compiled once for each instruction set, SSD_ATTENTION being the name of its table. Plain loops
// that compilers turn into vectors; nothing of the standard library, whose inline functions the
// linker would take from any of the sets.
#include "head_attention.h"

#include <cstring>

namespace ssd_operators {
namespace {

constexpr float masked = -3.0e38F;

// exp(x) for x <= 0, to about one unit in the last place, down to float32's least: among tokens
// that hardly anybody looks at, too, the least is evicted.
inline float exp_of(float x) {
    float const clamped = x < -104.0F ? -104.0F : x;
    auto const whole = static_cast<int32_t>(clamped * 1.44269504F - 0.5F);
    auto const n = static_cast<float>(whole);
    float r = clamped - n * 0.693359375F;
    r = r + n * 2.12194440e-4F;
    float p = 1.9875691500e-4F;
    p = p * r + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * r * r + r + 1.0F;
    int32_t const half = whole / 2;
    int32_t const bits[] = {(half + 127) * (1 << 23), (whole - half + 127) * (1 << 23)};
    float scales[2];
    std::memcpy(scales, bits, sizeof(scales));
    return p * scales[0] * scales[1];
}

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

// size: the head's width where it is known when this is compiled, so that sums stay in registers.
template <int size>
void attend_of(Slots const& slots, float const* query, int head_dim, int count, float* scratch,
               float* out) {
    int const width = size > 0 ? size : head_dim;
    for (int slot = 0; slot < count; ++slot) {
        float const* key = slots.key + static_cast<int64_t>(slot) * width;
        fetch(slots.value + static_cast<int64_t>(slot) * width, width);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < width; ++i) {
            sum += key[i] * query[i];
        }
        scratch[slot] = sum;
    }
    softmax(scratch, slots.position, count);
    float sums[size > 0 ? size : 1] = {};
    float* const total = size > 0 ? sums : out;
    if (size == 0) {
        std::memset(out, 0, sizeof(float) * static_cast<size_t>(width));
    }
    for (int slot = 0; slot < count; ++slot) {
        float const* value = slots.value + static_cast<int64_t>(slot) * width;
        float const weight = scratch[slot];
        fetch(slots.key + static_cast<int64_t>(slots.num_slots + slot) * width,
              width);  // next head
#pragma omp simd
        for (int i = 0; i < width; ++i) {
            total[i] += weight * value[i];
        }
    }
    if (size > 0) {
        std::memcpy(out, sums, sizeof(sums));
    }
}

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

}  // namespace

extern HeadAttention const SSD_ATTENTION;
HeadAttention const SSD_ATTENTION = {attend, lowest, SSD_ATTENTION_NAME};

}  // namespace ssd_operators
