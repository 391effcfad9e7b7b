#include "trt/window_pass.h"

#include <algorithm>

#include "failure.h"

namespace ssd_runtime {
namespace {

char const* const needed[] = {"window_tokens", "first", "limit", "noise",
                              "sampled",       "kept",  "logits"};

}  // namespace

WindowPass::WindowPass(DeviceQueue& queue, GraphContext& context, Sizes sizes,
                       BufferPlan const& plan, DeviceMemory const& memory, WindowDeviceNoise noise)
    : queue_(queue),
      context_(context),
      sizes_(std::move(sizes)),
      batch_(plan),
      batch_memory_(memory),
      noise_(std::move(noise)) {
    queue_.device().use();
    context_.set_sizes(sizes_);
    plan_ = plan_pass(
        {context_.name(), &context_.spec(), &context_.aliases(), sizes_, context_.scratch_bytes()},
        batch_);
    for (char const* const name : needed) {
        if (plan_.own.count(name) == 0) {
            fail(SSD_BAD_BUNDLE, "graph ", context_.spec().name, " has no tensor ", name,
                 "; export the bundle again");
        }
    }
    allocate();
}

void WindowPass::allocate() {
    check_device_memory("a pass of lookahead", plan_.num_bytes, queue_.device().free_bytes());
    memory_ = std::make_unique<DeviceMemory>(queue_.device(), plan_.num_bytes);
    queue_.fill(memory_->address(), 0, plan_.num_bytes);
    context_.use_scratch(memory_->address() + plan_.scratch.first, plan_.scratch.second);
    for (auto const* side : {&context_.spec().inputs, &context_.spec().outputs}) {
        for (TensorSpec const& tensor : *side) {
            auto const alias = context_.aliases().find(tensor.name);
            context_.bind(tensor.name,
                          place(alias == context_.aliases().end() ? tensor.name : alias->second));
        }
    }
}

void WindowPass::start(std::vector<ImageSeed> const& images, bool is_greedy) {
    if (is_greedy) {
        queue_.fill(place("noise"), 0, plan_.own.at("noise").num_bytes());
    }
    noise_.start(is_greedy ? std::vector<ImageSeed>{} : images);
}

SampledWindow WindowPass::run(Window const& window) {
    auto const images = window.first.size();
    auto const width = static_cast<size_t>(window.width());
    auto const places = static_cast<size_t>(sizes_.at("window"));
    if (images != static_cast<size_t>(sizes_.at("images")) || width > places) {
        fail(SSD_INTERNAL_ERROR, "a pass of ", places, " tokens was asked for ", width);
    }
    std::vector<int32_t> drafts(images * places, 0);
    for (size_t image = 0; image < images; ++image) {
        std::copy_n(window.inputs.data() + image * width, width, drafts.data() + image * places);
    }
    upload("window_tokens", drafts);
    upload("first", window.first);
    upload("limit", window.limit);
    noise_.write(window.first, sizes_.at("window"), place("noise"));
    launch();
    std::vector<int32_t> every(images * places);
    SampledWindow sampled{std::vector<int32_t>(images * width), std::vector<int64_t>(images)};
    queue_.queue_download(every.data(), place("sampled"), every.size() * sizeof(int32_t));
    queue_.download(sampled.kept.data(), place("kept"), images * sizeof(int64_t));
    window.check_kept(context_.spec().name, sampled.kept);
    for (size_t image = 0; image < images; ++image) {
        std::copy_n(every.data() + image * places, width, sampled.tokens.data() + image * width);
        keep(static_cast<int64_t>(image), window.first[image], sampled.kept[image]);
    }
    return sampled;
}

// The first pass is queued as it is: TensorRT loads and compiles kernels on the first run, and no
// other pass would leave the caches as they are.
void WindowPass::launch() {
    if (work_ != nullptr) {
        work_->launch();
        return;
    }
    queue_once();
    queue_.synchronize();
    work_ =
        std::make_unique<CapturedWork>(queue_, [this] { queue_once(); }, context_.is_capturable());
}

// The engine, then what its outputs are copied to, and the logits of each first place.
void WindowPass::queue_once() {
    queue_.device().use();
    context_.enqueue();
    DeviceAddress const batch = batch_memory_.address();
    for (Copy const& copy : plan_.copies) {
        queue_.copy(batch + copy.target, batch + copy.source, copy.num_bytes);
    }
    for (Copy const& copy : plan_.own_copies) {
        queue_.copy(batch + copy.target, memory_->address() + copy.source, copy.num_bytes);
    }
    size_t const line =
        batch_.buffer("logits").num_bytes() / static_cast<size_t>(sizes_.at("rows"));
    queue_.copy_rows({batch + batch_.buffer("logits").offset, line},
                     {place("logits"), line * static_cast<size_t>(sizes_.at("window"))}, line,
                     static_cast<size_t>(sizes_.at("rows")));
}

// Copies an image's tokens from where they were sampled into the grid of tokens, [steps, images].
void WindowPass::keep(int64_t image, int64_t first, int64_t count) {
    if (count == 0) {
        return;
    }
    auto const step_bytes = static_cast<size_t>(sizes_.at("images")) * sizeof(int32_t);
    auto const from = static_cast<size_t>(image * sizes_.at("window")) * sizeof(int32_t);
    DeviceAddress const tokens = batch_memory_.address() + batch_.buffer("tokens").offset;
    queue_.copy_rows({tokens + static_cast<size_t>(first) * step_bytes +
                          static_cast<size_t>(image) * sizeof(int32_t),
                      step_bytes},
                     {place("sampled") + from, sizeof(int32_t)}, sizeof(int32_t),
                     static_cast<size_t>(count));
}

DeviceAddress WindowPass::place(std::string const& tensor) const {
    auto const found = plan_.own.find(tensor);
    return found != plan_.own.end() ? memory_->address() + found->second.offset
                                    : batch_memory_.address() + batch_.buffer(tensor).offset;
}

template <typename Item>
void WindowPass::upload(std::string const& tensor, std::vector<Item> const& items) {
    uint64_t const capacity = plan_.own.at(tensor).num_bytes();
    if (capacity != items.size() * sizeof(Item)) {
        fail(SSD_BAD_BUNDLE, "the bundle's ", tensor, " has ", capacity,
             " bytes where this ssd_runtime makes ", items.size() * sizeof(Item),
             "; export the bundle again");
    }
    queue_.upload(place(tensor), items);
}

}  // namespace ssd_runtime
