#pragma once

#include <functional>
#include <memory>

#include "trt/cuda_device.h"

namespace ssd_runtime {

// What is queued again and again, as one CUDA graph that is captured with the first launch; its
// addresses and sizes are those of that moment.
class CapturedWork {
public:
    // captures: false queues it anew every time, which takes the host longer.
    CapturedWork(DeviceQueue& queue, std::function<void()> work, bool captures)
        : queue_(queue), work_(std::move(work)), captures_(captures) {}

    // Queues the work; waits for nothing.
    void launch();
    // False where it cannot be captured.
    bool captures() const { return captures_; }

private:
    DeviceQueue& queue_;
    std::function<void()> work_;
    bool captures_;
    std::unique_ptr<DeviceQueue::Graph> graph_;
};

}  // namespace ssd_runtime
