#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ssd_runtime {

// What the random numbers of an image depend on: the seed of its request and its number there.
struct ImageSeed {
    uint64_t seed;
    uint32_t image;
};

// Writes Gumbel noise float32 [num_steps, images, codebook] of steps from first_step on: the bits
// that ssd_export/noise.py defines.
void fill_noise(std::vector<ImageSeed> const& images, size_t codebook_size, int64_t first_step,
                int64_t num_steps, float* noise);

}  // namespace ssd_runtime
