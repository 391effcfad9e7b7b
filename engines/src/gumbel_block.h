// Gumbel noise of one step of an image, as ssd_export/noise.py defines it, in loops that compilers
// turn into vectors. For files that are compiled without fused multiply-add; nothing of the
// standard library, since some are compiled for several instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

namespace ssd_runtime {
namespace {

constexpr int words_per_counter = 4;
constexpr int counters_at_once = 256;  // of one pass: their words stay in the first cache
constexpr int philox_rounds = 10;

// -log x of a positive float32 that is not subnormal; every operation rounds once.
inline float negative_log(float x) {
    constexpr int32_t sqrt_half_bits = 0x3F3504F3;
    constexpr float p0 = -0x1.000002p+1F, p1 = -0x1.554268p-1F, p2 = -0x1.a6dff6p-2F;
    constexpr float minus_log_2 = -0x1.62e430p-1F;
    int32_t bits = 0;
    std::memcpy(&bits, &x, sizeof bits);
    int32_t const exponent = (bits - sqrt_half_bits) >> 23;
    int32_t const reduced = bits - static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23U);
    float m = 0;
    std::memcpy(&m, &reduced, sizeof m);
    float const f = m - 1.0F;
    float const s = f / (f + 2.0F);
    float const z = s * s;
    float const p = (p2 * z + p1) * z + p0;
    return static_cast<float>(exponent) * minus_log_2 + s * p;
}

// One round of Philox4x32 over `count` counters, word by word.
inline void philox_round(uint32_t (*words)[counters_at_once], int count, uint32_t key0,
                         uint32_t key1) {
    for (int i = 0; i < count; ++i) {
        uint64_t const left = uint64_t{words[0][i]} * 0xD2511F53U;
        uint64_t const right = uint64_t{words[2][i]} * 0xCD9E8D57U;
        words[0][i] = static_cast<uint32_t>(right >> 32U) ^ words[1][i] ^ key0;
        words[1][i] = static_cast<uint32_t>(right);
        words[2][i] = static_cast<uint32_t>(left >> 32U) ^ words[3][i] ^ key1;
        words[3][i] = static_cast<uint32_t>(left);
    }
}

// Output words of the counters {first + i, 0...}: word w of counter i at [w][i].
inline void philox(uint32_t const (&counter)[words_per_counter], int varying, int count,
                   uint64_t key, uint32_t (*words)[counters_at_once]) {
    for (int word = 0; word < words_per_counter; ++word) {
        for (int i = 0; i < count; ++i) {
            words[word][i] = counter[word] + (word == varying ? static_cast<uint32_t>(i) : 0U);
        }
    }
    auto key0 = static_cast<uint32_t>(key);
    auto key1 = static_cast<uint32_t>(key >> 32U);
    for (int round = 0; round < philox_rounds; ++round) {
        philox_round(words, count, key0, key1);
        key0 += 0x9E3779B9U;
        key1 += 0xBB67AE85U;
    }
}

// noise float32 [num_codes].
inline void fill_gumbel(uint64_t seed, uint32_t image, uint32_t step, int64_t num_codes,
                        float* noise) {
    uint32_t words[words_per_counter][counters_at_once];
    float g[counters_at_once * words_per_counter];
    for (int64_t start = 0; start < num_codes; start += counters_at_once * words_per_counter) {
        int64_t const left = num_codes - start;
        int const codes = left < counters_at_once * words_per_counter
                              ? static_cast<int>(left)
                              : counters_at_once * words_per_counter;
        int const count = (codes + words_per_counter - 1) / words_per_counter;
        auto const block = static_cast<uint32_t>(start / words_per_counter);
        philox({step, image, block, 0}, 2, count, seed, words);
        for (int word = 0; word < words_per_counter; ++word) {
            for (int i = 0; i < count; ++i) {
                auto const odd = static_cast<int32_t>((words[word][i] >> 8U) | 1U);
                g[i * words_per_counter + word] =
                    negative_log(negative_log(static_cast<float>(odd) * 0x1p-24F));
            }
        }
        std::memcpy(noise + start, g, sizeof(float) * static_cast<size_t>(codes));
    }
}

}  // namespace
}  // namespace ssd_runtime
