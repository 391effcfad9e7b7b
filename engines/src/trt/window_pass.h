#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runner.h"
#include "trt/buffer_plan.h"
#include "trt/captured_work.h"
#include "trt/device_noise.h"
#include "trt/loaded_engines.h"

namespace ssd_runtime {

// A pass of lookahead on the GPU: the engine of decode_window over the caches of a batch.
//
// Every pass has the places that the engine was built for; what is asked for beyond the limits is
// computed and not kept. So it is one CUDA graph. The host gives it steps, limits and drafts, waits
// once, and reads what was sampled and how much of it counts.
class WindowPass {
public:
    // context: of the engine; sizes: of its named dimensions; plan, memory: of the batch, whose
    // caches and tokens it changes. Throws Failure for too little device memory.
    WindowPass(DeviceQueue& queue, GraphContext& context, Sizes sizes, BufferPlan const& plan,
               DeviceMemory const& memory, WindowDeviceNoise noise);

    // Takes a batch of this size.
    void start(std::vector<ImageSeed> const& images, bool is_greedy);
    // The tokens that were kept are in the grid of tokens, the logits of each first place where a
    // step leaves its.
    SampledWindow run(Window const& window);
    // False where passes are queued anew every time.
    bool is_captured() const { return work_ == nullptr || work_->captures(); }

private:
    DeviceAddress place(std::string const& tensor) const;
    template <typename Item>
    void upload(std::string const& tensor, std::vector<Item> const& items);
    void allocate();
    void launch();
    void queue_once();
    void keep(int64_t image, int64_t first, int64_t count);

    DeviceQueue& queue_;
    GraphContext& context_;
    Sizes sizes_;
    BufferPlan const& batch_;
    DeviceMemory const& batch_memory_;
    PassPlan plan_;
    WindowDeviceNoise noise_;
    std::unique_ptr<DeviceMemory> memory_;
    std::unique_ptr<CapturedWork> work_;  // once a pass has run
};

}  // namespace ssd_runtime
