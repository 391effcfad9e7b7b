#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "config.h"
#include "noise.h"
#include "trt/cuda_device.h"

namespace ssd_runtime {

// Noise of windows: writes float32 [images, window, codebook] at an address, each image's from its
// own step on, by a launch for each image.
class WindowDeviceNoise {
public:
    // kernel: outlives this.
    WindowDeviceNoise(DeviceQueue& queue, DeviceKernel& kernel, int64_t codes)
        : queue_(queue), kernel_(kernel), codes_(codes) {}

    // Takes a batch; without images nothing is written.
    void start(std::vector<ImageSeed> const& images);
    // Queues the noise of `width` steps from each image's first one on.
    void write(std::vector<int64_t> const& first, int64_t width, DeviceAddress address);

private:
    DeviceQueue& queue_;
    DeviceKernel& kernel_;
    int64_t codes_;
    std::unique_ptr<DeviceMemory> images_;
    size_t num_images_ = 0, room_ = 0;  // of the batch; of the memory
};

// The noise of a batch on the GPU: writes float32 [grid width, images, codebook] at an address, in
// the order of the queue. Step s reads row s mod grid width.
class DeviceNoise {
public:
    DeviceNoise(DeviceQueue& queue, ModelConfig const& model);

    // Takes a batch, whose noise goes to this address.
    void start(std::vector<ImageSeed> const& images, DeviceAddress address);
    // Queues the noise of the step's grid row, where that of another one is there.
    void reach(int64_t step);
    // Noise of windows by the same kernel; goes before this.
    WindowDeviceNoise windows() { return {queue_, kernel_, model_.codebook_size}; }

private:
    DeviceQueue& queue_;
    ModelConfig const& model_;
    DeviceKernel kernel_;
    std::unique_ptr<DeviceMemory> images_;
    size_t num_images_ = 0;
    DeviceAddress address_ = 0;
    std::optional<int64_t> row_;
};

}  // namespace ssd_runtime
