#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "config.h"
#include "noise.h"
#include "trt/cuda_device.h"

namespace ssd_runtime {

// The noise of a batch on the GPU: writes float32 [grid width, images, codebook] at an address, in
// the order of the queue. Step s reads row s mod grid width.
class DeviceNoise {
public:
    DeviceNoise(DeviceQueue& queue, ModelConfig const& model);

    // Takes a batch, whose noise goes to this address.
    void start(std::vector<ImageSeed> const& images, DeviceAddress address);
    // Queues the noise of the step's grid row, where that of another one is there.
    void reach(int64_t step);

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
