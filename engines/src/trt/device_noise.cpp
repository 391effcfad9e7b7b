#include "trt/device_noise.h"

namespace ssd_runtime {

extern char const noise_kernel_ptx[];  // ssd_export/kernels/gumbel_noise.ptx

namespace {

// As ssd_export/kernels/noise_image.py says.
char const entry[] = "gumbel_noise_kernel";
constexpr int64_t codes_per_program = 4 * 256;
constexpr unsigned threads_per_program = 4 * 32;

}  // namespace

DeviceNoise::DeviceNoise(DeviceQueue& queue, ModelConfig const& model)
    : queue_(queue), model_(model), kernel_(queue.device(), noise_kernel_ptx, entry) {}

void DeviceNoise::start(std::vector<ImageSeed> const& images, DeviceAddress address) {
    std::vector<uint32_t> words;
    for (ImageSeed const& image : images) {
        words.insert(words.end(), {static_cast<uint32_t>(image.seed),
                                   static_cast<uint32_t>(image.seed >> 32U), image.image});
    }
    if (num_images_ != images.size()) {
        images_.reset();
        images_ = std::make_unique<DeviceMemory>(queue_.device(), words.size() * sizeof(uint32_t));
        num_images_ = images.size();
    }
    queue_.upload(images_->address(), words);
    address_ = address;
    row_.reset();
}

void DeviceNoise::reach(int64_t step) {
    int64_t const width = model_.grid.width;
    if (row_ == step / width) {
        return;
    }
    row_ = step / width;
    DeviceAddress images = images_->address();
    DeviceAddress unused = 0;  // two pointers to Triton's scratch memory, which the kernel has not
    auto first_step = static_cast<int32_t>(*row_ * width);
    auto num_images = static_cast<int32_t>(num_images_);
    auto codes = static_cast<int32_t>(model_.codebook_size);
    void* arguments[] = {&address_, &images, &first_step, &num_images, &codes, &unused, &unused};
    kernel_.launch(queue_, static_cast<unsigned>(width * num_images),
                   static_cast<unsigned>((codes + codes_per_program - 1) / codes_per_program),
                   threads_per_program, arguments);
}

}  // namespace ssd_runtime
