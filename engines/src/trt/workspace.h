#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "trt/buffer_plan.h"
#include "trt/captured_work.h"
#include "trt/device_noise.h"
#include "trt/loaded_engines.h"
#include "trt/prompt_rows.h"
#include "trt/window_pass.h"

namespace ssd_runtime {

// What one generation at a time has of its own: a stream, a context of each engine, the memory of
// one batch size, the noise, and the decode step as CUDA graphs. Kept between generations.
//
// A step is captured with an eviction before it and without, once each, and launched for every
// token (captured_work.h): its number is counted on the device, and each head decides there whether
// it evicts (R7). The host only leaves out evictions that would find no full head.
class Workspace {
public:
    explicit Workspace(std::shared_ptr<LoadedEngines> engines);
    Workspace(Workspace const&) = delete;
    Workspace& operator=(Workspace const&) = delete;
    // Destroys what runs before what it runs on.
    ~Workspace();

    // Makes room for a batch of this size; memory of another size is freed first. Throws Failure
    // for a size that the engines do not take, or too little device memory.
    void allocate(int64_t num_images, bool top_k);
    bool is_allocated() const { return memory_ != nullptr; }

    // Numbers of images at which the prefill of this batch may run, ascending.
    std::vector<int64_t> const& prompt_sizes() const { return prompt_sizes_; }
    // Queues the prefill of these rows, as many as a number of prompt_sizes has. embeds:
    // [rows, prompt slots, width]; lengths: [rows].
    void run_prefill(std::vector<float> const& embeds, std::vector<int32_t> const& lengths);
    // The contexts of the image decoder by the number of images that they take.
    std::map<int64_t, GraphContext*> const& decoders() const { return decoders_; }
    Sizes const& sizes() const { return sizes_; }
    DeviceQueue& queue() { return queue_; }
    DeviceNoise& noise() { return noise_; }

    // Zeros in all shared buffers (0 x NaN would be NaN), and no token in any slot.
    void clear();
    // Prompt token t to slot t of its row; all else stays as clear left it (R8). What the prefill
    // has written into a cache by itself is there, in the rows that it computed. place: of each
    // row's prompt among those computed.
    void fill_caches(std::vector<int32_t> const& lengths, std::vector<size_t> const& place);
    DeviceAddress address(std::string const& tensor, std::string const& context = "") const {
        return memory_->address() + plan_.buffer(tensor, context).offset;
    }
    Buffer const& buffer(std::string const& tensor, std::string const& context = "") const {
        return plan_.buffer(tensor, context);
    }
    // Throws Failure SSD_BAD_BUNDLE where the buffer has another size.
    template <typename Item>
    void upload(std::string const& tensor, std::vector<Item> const& items,
                std::string const& context = "") {
        check_size(tensor, context, items.size() * sizeof(Item));
        queue_.upload(address(tensor, context), items);
    }
    // The same at the beginning of a buffer that may have more rows.
    template <typename Item>
    void upload_first(std::string const& tensor, std::vector<Item> const& items,
                      std::string const& context = "") {
        check_fits(tensor, context, items.size() * sizeof(Item));
        queue_.upload(address(tensor, context), items);
    }
    // The first numbers of a buffer; waits for the device.
    std::vector<float> download_first(std::string const& tensor, size_t count);
    uint64_t cache_bytes() const;

    // Queues a decode step, with an eviction before it or without.
    void launch_step(bool evict);
    // Whether evictions have their own engine.
    bool has_evictions() const { return evict_ != nullptr; }
    // Queues an eviction of all rows, where some head is full; and of some rows alone.
    void launch_evict() { work_.at(Work::evict).launch(); }
    void evict_rows(std::vector<size_t> const& rows);
    // The pass of lookahead, allocated when it is first asked for. Throws Failure where its engine
    // does not take this many images, or for too little device memory.
    WindowPass& window_pass();
    // Whether a step, and a pass, is one CUDA graph; otherwise its kernels are queued one by one.
    bool step_is_captured() const;

    // What a batch takes beside engines and weights, from engine.json alone.
    static uint64_t planned_bytes(EngineFiles const& files, int64_t num_images);

private:
    enum class Work { step, evict, evict_and_step };

    GraphContext& context(std::string const& graph, int64_t num_images);
    void plan_memory(std::vector<GraphContext*> const& contexts);
    void bind(GraphContext& context);
    void run(GraphContext& context);
    void queue_step();
    void queue_evict();
    void try_out();
    void prepare_work();
    void check_size(std::string const& tensor, std::string const& context, size_t size) const;
    void check_fits(std::string const& tensor, std::string const& context, size_t size) const;
    void resize_prefill(int64_t num_images);
    void copy_prompts(std::string const& past, std::vector<RowCopy> const& copies);

    // In the order in which they are made: each is destroyed before those above it.
    std::shared_ptr<LoadedEngines> engines_;
    DeviceQueue queue_;
    BufferPlan plan_;
    std::unique_ptr<DeviceMemory> memory_;
    std::map<std::pair<std::string, int32_t>, std::unique_ptr<GraphContext>> contexts_;
    DeviceNoise noise_;
    std::map<Work, CapturedWork> work_;
    std::unique_ptr<WindowPass> window_;

    int64_t num_images_ = 0;
    bool top_k_ = false;
    Sizes sizes_;
    GraphContext *prefill_ = nullptr, *decode_ = nullptr, *evict_ = nullptr;
    std::map<int64_t, GraphContext*> decoders_;
    std::vector<int64_t> prompt_sizes_;
};

}  // namespace ssd_runtime
