// Prints the bits of Gumbel noise: ssd_noise SEED IMAGE CODEBOOK FIRST_STEP NUM_STEPS [CODE], all
// of it or of one code.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../src/noise.h"

int main(int argc, char** argv) {
    if (argc < 6) {
        std::fprintf(stderr, "usage: ssd_noise SEED IMAGE CODEBOOK FIRST_STEP NUM_STEPS [CODE]\n");
        return 2;
    }
    ssd_runtime::ImageSeed const image{std::strtoull(argv[1], nullptr, 10),
                                       static_cast<uint32_t>(std::strtoul(argv[2], nullptr, 10))};
    auto const codebook = static_cast<size_t>(std::atol(argv[3]));
    auto const num_steps = static_cast<size_t>(std::atol(argv[5]));
    std::vector<float> noise(codebook * num_steps);
    ssd_runtime::fill_noise({image}, codebook, std::atol(argv[4]), static_cast<int64_t>(num_steps),
                            noise.data());
    size_t const begin = argc > 6 ? static_cast<size_t>(std::atol(argv[6])) : 0;
    size_t const end = argc > 6 ? begin + 1 : noise.size();
    for (size_t i = begin; i < end; ++i) {
        uint32_t bits = 0;
        std::memcpy(&bits, &noise[i], sizeof bits);
        std::printf("%08" PRIx32 "\n", bits);
    }
    return 0;
}
