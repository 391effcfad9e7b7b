#include "noise.h"

#include <cstddef>

namespace ssd_runtime {

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

std::vector<float> uniforms(uint64_t seed, int64_t num_steps, int64_t first_image,
                            int64_t num_images) {
    std::vector<float> numbers;
    numbers.reserve(static_cast<size_t>(num_steps * num_images));
    for (int64_t step = 0; step < num_steps; ++step) {
        for (int64_t image = first_image; image < first_image + num_images; ++image) {
            uint32_t const word = philox4x32(
                {static_cast<uint32_t>(step), static_cast<uint32_t>(image), 0, 0}, seed)[0];
            numbers.push_back(static_cast<float>(word >> 8U) * 0x1p-24F);
        }
    }
    return numbers;
}

}  // namespace ssd_runtime
