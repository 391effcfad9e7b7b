// ssd_export/noise.py defines the noise; this file is compiled without fused multiply-add.
#include "noise.h"

#include "gumbel_block.h"

namespace ssd_runtime {

void fill_noise(std::vector<ImageSeed> const& images, size_t codebook_size, int64_t first_step,
                int64_t num_steps, float* noise) {
    for (int64_t step = first_step; step < first_step + num_steps; ++step) {
        for (ImageSeed const& image : images) {
            fill_gumbel(image.seed, image.image, static_cast<uint32_t>(step),
                        static_cast<int64_t>(codebook_size), noise);
            noise += codebook_size;
        }
    }
}

}  // namespace ssd_runtime
