// The race that a token wins, and its noise. Compiled once for each instruction set and without
// fused multiply-add: these are the bits that ssd_export/noise.py defines, and those of ordinary
// operators (ssd_export/export/sampler.py).
#include "../src/gumbel_block.h"
#include "kernels.h"

namespace ssd_operators {
namespace SSD_SET {

void fill_noise(uint64_t seed, uint32_t image, uint32_t step, int64_t num_codes, float* noise) {
    ssd_runtime::fill_gumbel(seed, image, step, num_codes, noise);
}

int64_t draw(Race const& race, int64_t num_codes, float* scratch) {
    float const *conditional = race.conditional, *unconditional = race.unconditional;
    float const scale = race.cfg_scale, temperature = race.temperature;
    if (unconditional == nullptr) {
        for (int64_t code = 0; code < num_codes; ++code) {
            scratch[code] = conditional[code] + temperature * race.noise[code];
        }
    } else {
        for (int64_t code = 0; code < num_codes; ++code) {
            float const guided =
                unconditional[code] + scale * (conditional[code] - unconditional[code]);
            scratch[code] = guided + temperature * race.noise[code];
        }
    }
    float greatest = scratch[0];
#pragma omp simd reduction(max : greatest)
    for (int64_t code = 0; code < num_codes; ++code) {
        greatest = scratch[code] > greatest ? scratch[code] : greatest;
    }
    int64_t first = 0;
    while (first < num_codes && scratch[first] != greatest) {
        ++first;
    }
    return first < num_codes ? first : 0;  // none where they are no numbers
}

}  // namespace SSD_SET
}  // namespace ssd_operators
