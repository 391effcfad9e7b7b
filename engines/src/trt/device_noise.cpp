#include "trt/device_noise.h"

#include "failure.h"

namespace ssd_runtime {

extern char const noise_kernel_ptx[];  // ssd_export/kernels/gumbel_noise.ptx

namespace {

// As ssd_export/kernels/noise_image.py says.
char const entry[] = "gumbel_noise_kernel";
constexpr int64_t codes_per_program = 4 * 256;
constexpr unsigned threads_per_program = 4 * 32;
constexpr size_t alignment = 16;  // bytes, of the kernel's addresses
constexpr size_t words_of_an_image = 3;

// What the kernel takes. images: words_of_an_image for each.
struct Launch {
    DeviceAddress noise, images;
    int64_t first_step, num_images, codes;
};

void launch(DeviceQueue& queue, DeviceKernel& kernel, int64_t num_steps, Launch what) {
    DeviceAddress unused = 0;  // two pointers to Triton's scratch memory, which the kernel has not
    auto first_step = static_cast<int32_t>(what.first_step);
    auto num_images = static_cast<int32_t>(what.num_images);
    auto codes = static_cast<int32_t>(what.codes);
    void* arguments[] = {&what.noise, &what.images, &first_step, &num_images,
                         &codes,      &unused,      &unused};
    kernel.launch(queue, static_cast<unsigned>(num_steps * num_images),
                  static_cast<unsigned>((what.codes + codes_per_program - 1) / codes_per_program),
                  threads_per_program, arguments);
}

// pitch: words from one image to the next.
std::vector<uint32_t> words_of(std::vector<ImageSeed> const& images, size_t pitch) {
    std::vector<uint32_t> words(images.size() * pitch, 0);
    for (size_t i = 0; i < images.size(); ++i) {
        words[i * pitch] = static_cast<uint32_t>(images[i].seed);
        words[i * pitch + 1] = static_cast<uint32_t>(images[i].seed >> 32U);
        words[i * pitch + 2] = images[i].image;
    }
    return words;
}

}  // namespace

void WindowDeviceNoise::start(std::vector<ImageSeed> const& images) {
    num_images_ = images.size();
    if (images.empty()) {
        return;
    }
    std::vector<uint32_t> const words = words_of(images, alignment / sizeof(uint32_t));
    if (room_ < words.size()) {
        images_.reset();
        images_ = std::make_unique<DeviceMemory>(queue_.device(), words.size() * sizeof(uint32_t));
        room_ = words.size();
    }
    queue_.upload(images_->address(), words);
}

void WindowDeviceNoise::write(std::vector<int64_t> const& first, int64_t width,
                              DeviceAddress address) {
    size_t const size = static_cast<size_t>(width * codes_) * sizeof(float);
    if (num_images_ > 1 && size % alignment != 0) {
        fail(SSD_BAD_BUNDLE, width, " steps of ", codes_,
             " codes are no multiple of 16 bytes, which the noise of several images takes; use "
             "lookahead 1");
    }
    for (size_t image = 0; image < num_images_; ++image) {
        launch(queue_, kernel_, width,
               {address + size * image, images_->address() + alignment * image, first[image], 1,
                codes_});
    }
}

DeviceNoise::DeviceNoise(DeviceQueue& queue, ModelConfig const& model)
    : queue_(queue), model_(model), kernel_(queue.device(), noise_kernel_ptx, entry) {}

void DeviceNoise::start(std::vector<ImageSeed> const& images, DeviceAddress address) {
    std::vector<uint32_t> const words = words_of(images, words_of_an_image);
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
    launch(queue_, kernel_, width,
           {address_, images_->address(), *row_ * width, static_cast<int64_t>(num_images_),
            model_.codebook_size});
}

}  // namespace ssd_runtime
