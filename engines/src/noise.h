#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace ssd_runtime {

// Philox4x32-10: four output words of a counter (ssd_export/runtime has the source).
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, uint64_t key);

// Uniform numbers in [0, 1), float32 [num_steps, num_images]: a pure function of seed, step and
// image. first_image: the number of the first column.
std::vector<float> uniforms(uint64_t seed, int64_t num_steps, int64_t first_image,
                            int64_t num_images);

}  // namespace ssd_runtime
