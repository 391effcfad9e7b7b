// ssd_export/noise.py defines the noise; this file is compiled without fused multiply-add.
#include "noise.h"

#include <algorithm>
#include <cstring>

namespace ssd_runtime {
namespace {

constexpr size_t words_per_counter = 4;
constexpr size_t block_size = 1024;  // codes of one pass: they stay in the first cache

template <typename To, typename From>
To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// -log x of a positive float32 that is not subnormal; every operation rounds once.
inline float negative_log(float x) {
    constexpr int32_t sqrt_half_bits = 0x3F3504F3;
    constexpr float p0 = -0x1.000002p+1F, p1 = -0x1.554268p-1F, p2 = -0x1.a6dff6p-2F;
    constexpr float minus_log_2 = -0x1.62e430p-1F;
    auto const bits = bits_as<int32_t>(x);
    int32_t const exponent = (bits - sqrt_half_bits) >> 23;
    auto const m =
        bits_as<float>(bits - static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23U));
    float const f = m - 1.0F;
    float const s = f / (f + 2.0F);
    float const z = s * s;
    float const p = (p2 * z + p1) * z + p0;
    return static_cast<float>(exponent) * minus_log_2 + s * p;
}

void fill_words(uint64_t seed, uint32_t step, uint32_t image, size_t first_block, size_t num_blocks,
                uint32_t* words) {
    for (size_t block = 0; block < num_blocks; ++block) {
        auto const number = static_cast<uint32_t>(first_block + block);
        std::array<uint32_t, 4> const out = philox4x32({step, image, number, 0}, seed);
        std::copy(out.begin(), out.end(), words + block * words_per_counter);
    }
}

}  // namespace

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, uint64_t key) {
    auto key0 = static_cast<uint32_t>(key);
    auto key1 = static_cast<uint32_t>(key >> 32U);
    for (int round = 0; round < 10; ++round) {
        uint64_t const left = uint64_t{counter[0]} * 0xD2511F53U;
        uint64_t const right = uint64_t{counter[2]} * 0xCD9E8D57U;
        counter = {
            static_cast<uint32_t>(right >> 32U) ^ counter[1] ^ key0, static_cast<uint32_t>(right),
            static_cast<uint32_t>(left >> 32U) ^ counter[3] ^ key1, static_cast<uint32_t>(left)};
        key0 += 0x9E3779B9U;
        key1 += 0xBB67AE85U;
    }
    return counter;
}

void fill_noise(std::vector<ImageSeed> const& images, size_t codebook_size, int64_t first_step,
                int64_t num_steps, float* noise) {
    uint32_t words[block_size];
    for (int64_t step = first_step; step < first_step + num_steps; ++step) {
        for (ImageSeed const& image : images) {
            for (size_t start = 0; start < codebook_size; start += block_size) {
                size_t const count = std::min(block_size, codebook_size - start);
                fill_words(image.seed, static_cast<uint32_t>(step), image.image,
                           start / words_per_counter,
                           (count + words_per_counter - 1) / words_per_counter, words);
                for (size_t code = 0; code < count; ++code) {
                    auto const odd = static_cast<int32_t>((words[code] >> 8U) | 1U);
                    float const u = static_cast<float>(odd) * 0x1p-24F;
                    noise[start + code] = negative_log(negative_log(u));
                }
            }
            noise += codebook_size;
        }
    }
}

}  // namespace ssd_runtime
