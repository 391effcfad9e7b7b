#include "trt/trt_runner.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

#include "cuda_driver.h"
#include "failure.h"
#include "finite.h"
#include "trt/prompt_rows.h"
#include "trt/workspace.h"

namespace ssd_runtime {
namespace {

constexpr int64_t most_sorted_codes = 3840;  // TensorRT's TopK takes no more

// What the runners of one model share: its engines, and the workspace that the last of them left.
class SharedEngines {
public:
    SharedEngines(Bundle const& bundle, Nvinfer const& nvinfer, int device)
        : engines_(std::make_shared<LoadedEngines>(bundle, nvinfer, device)) {}

    LoadedEngines& engines() const { return *engines_; }

    // The idle workspace, else a new one.
    std::unique_ptr<Workspace> take() {
        std::lock_guard<std::mutex> const lock(mutex_);
        return idle_ != nullptr ? std::move(idle_) : std::make_unique<Workspace>(engines_);
    }

    // For the next generation. One is kept: a second one at the same time is not the rule.
    void give_back(std::unique_ptr<Workspace> workspace) {
        std::lock_guard<std::mutex> const lock(mutex_);
        idle_ = std::move(workspace);
    }

private:
    std::shared_ptr<LoadedEngines> engines_;
    std::mutex mutex_;
    std::unique_ptr<Workspace> idle_;
};

// Tokens, caches, sampling and evictions stay on the GPU; the host reads tokens after a grid row,
// never inside one.
class TrtRunner : public Runner {
public:
    explicit TrtRunner(std::shared_ptr<SharedEngines> shared)
        : shared_(std::move(shared)), config_(shared_->engines().config()) {}

    ~TrtRunner() override {
        if (workspace_ != nullptr && is_whole_) {
            shared_->give_back(std::move(workspace_));
        }
    }

    void prefill(PromptBatch const& batch) override;
    void decode_row(int64_t first, int64_t last, std::atomic<bool> const& stop) override;
    std::string why_no_window() const override {
        return shared_->engines().files().why_no_window();
    }
    int64_t fixed_window() const override { return shared_->engines().files().window(); }
    SampledWindow decode_window(Window const& window) override;
    std::vector<int32_t> tokens() override;
    void decode_image(int32_t const* codes, int64_t count, uint8_t* pixels) override;
    uint64_t cache_bytes() const override { return workspace_->cache_bytes(); }
    bool step_is_captured() const override {
        return workspace_ != nullptr && workspace_->step_is_captured();
    }

private:
    // A workspace in which a call failed half-way serves no other generation.
    class Attempt {
    public:
        explicit Attempt(bool& is_whole) : is_whole_(is_whole) { is_whole_ = false; }
        Attempt(Attempt const&) = delete;
        Attempt& operator=(Attempt const&) = delete;
        ~Attempt() = default;
        void succeeded() { is_whole_ = true; }

    private:
        bool& is_whole_;
    };

    Workspace& allocated(int64_t num_images, bool top_k);
    std::vector<float> padded(PromptBatch const& batch, std::vector<size_t> const& rows) const;
    void draw_first(PromptBatch const& batch, std::vector<size_t> const& place);
    void upload_sampling(Sampling const& sampling);
    int64_t limited_top_k(int64_t top_k) const;
    void go_to(int64_t step);
    void reach_noise(int64_t step);
    void evict_images(Window const& window);
    void check_finite(int64_t step);

    std::shared_ptr<SharedEngines> shared_;
    Config const& config_;
    std::unique_ptr<Workspace> workspace_;
    std::vector<ImageSeed> seeds_;  // of a batch whose passes of lookahead are not begun
    std::set<int64_t> evictions_;   // steps before which some head is full
    int64_t step_ = 0;              // the next one, as the device counts
    bool needs_noise_ = false, is_whole_ = true;
};

Workspace& TrtRunner::allocated(int64_t num_images, bool top_k) {
    if (workspace_ == nullptr) {
        workspace_ = shared_->take();
    }
    workspace_->allocate(num_images, top_k);
    return *workspace_;
}

void TrtRunner::prefill(PromptBatch const& batch) {
    Attempt attempt(is_whole_);
    Workspace& workspace = allocated(batch.num_images(), batch.sampling.top_k > 0);
    workspace.clear();
    workspace.upload("prompt_length", batch.lengths);
    workspace.upload("step", std::vector<int64_t>{1});
    upload_sampling(batch.sampling);
    needs_noise_ = batch.sampling.temperature > 0;  // a greedy batch's stays 0, as it was cleared
    workspace.noise().start(batch.images, workspace.address("noise"));
    reach_noise(0);
    PromptRows const rows = rows_to_compute(batch, workspace.prompt_sizes());
    std::vector<int32_t> lengths;
    for (size_t const row : rows.computed) {
        lengths.push_back(batch.lengths[row]);
    }
    workspace.run_prefill(padded(batch, rows.computed), lengths);
    workspace.fill_caches(batch.lengths, rows.place);
    if (rows.computed.size() < batch.lengths.size()) {
        draw_first(batch, rows.place);
    }
    step_ = 1;
    seeds_ = batch.images;
    evictions_.clear();
    for (EvictionKind const& kind : config_.policy.eviction_kinds()) {
        evictions_.merge(config_.policy.full_before(kind, batch.lengths));
    }
    attempt.succeeded();
}

// Embeddings of rows, each as long as the engines' prompts.
std::vector<float> TrtRunner::padded(PromptBatch const& batch,
                                     std::vector<size_t> const& rows) const {
    auto const slots = static_cast<size_t>(shared_->engines().files().manifest().prompt_slots);
    size_t const width = batch.embeds.size() / batch.lengths.size();  // numbers of a row
    size_t const size = slots * (width / static_cast<size_t>(batch.width));
    std::vector<float> embeds(rows.size() * size);
    for (size_t place = 0; place < rows.size(); ++place) {
        std::copy_n(batch.embeds.begin() + static_cast<std::ptrdiff_t>(rows[place] * width),
                    std::min(width, size),
                    embeds.begin() + static_cast<std::ptrdiff_t>(place * size));
    }
    return embeds;
}

// Token 0 of every image, from logits of other rows than the batch's, of which the engine has
// sampled what is nobody's.
void TrtRunner::draw_first(PromptBatch const& batch, std::vector<size_t> const& place) {
    auto const codes = static_cast<size_t>(config_.model.codebook_size);
    size_t const computed = *std::max_element(place.begin(), place.end()) + 1;
    std::vector<float> const made = workspace_->download_first("logits", computed * codes);
    std::vector<float> logits;
    for (size_t const from : place) {
        auto const begin = made.begin() + static_cast<std::ptrdiff_t>(from * codes);
        logits.insert(logits.end(), begin, begin + static_cast<std::ptrdiff_t>(codes));
    }
    std::vector<float> const noise =
        workspace_->download_first("noise", batch.images.size() * codes);
    Sampling sampling = batch.sampling;
    sampling.top_k = limited_top_k(sampling.top_k);
    workspace_->upload_first("tokens", draw_tokens(logits, noise, codes, sampling));
    workspace_->upload("logits", logits);
    workspace_->upload("prompt_length", batch.lengths);
}

void TrtRunner::upload_sampling(Sampling const& sampling) {
    auto const images = static_cast<size_t>(workspace_->sizes().at("images"));
    workspace_->upload("cfg_scale", std::vector<float>(images, sampling.cfg_scale));
    workspace_->upload("temperature", std::vector<float>(images, sampling.temperature));
    if (sampling.top_k > 0) {
        workspace_->upload("top_k", std::vector<int64_t>(images, limited_top_k(sampling.top_k)));
    }
}

// As engines take it: 0 where it keeps every code.
int64_t TrtRunner::limited_top_k(int64_t top_k) const {
    int64_t const codes = config_.model.codebook_size;
    int64_t const most = std::min(codes, most_sorted_codes);
    if (top_k < codes && top_k > most) {
        fail(SSD_INVALID_ARGUMENT, "top_k ", top_k, " is above ", most,
             ", the most codes that TensorRT sorts; use ", most,
             " or fewer, 0 for all, or the backend onnxruntime");
    }
    return top_k >= codes ? 0 : top_k;
}

// The device counts steps by itself; it is told where a caller goes elsewhere.
void TrtRunner::go_to(int64_t step) {
    if (step != step_) {
        workspace_->upload("step", std::vector<int64_t>{step});
        step_ = step;
    }
}

void TrtRunner::reach_noise(int64_t step) {
    if (needs_noise_) {
        workspace_->noise().reach(step);
    }
}

void TrtRunner::decode_row(int64_t first, int64_t last, std::atomic<bool> const& stop) {
    Attempt attempt(is_whole_);
    go_to(first);
    reach_noise(first);
    for (int64_t step = first; step < last && !stop; ++step) {
        workspace_->launch_step(evictions_.count(step) > 0);
        step_ = step + 1;
    }
    if (!stop && last % config_.model.grid.width == 0) {  // the host waits after a grid row alone
        check_finite(last - 1);
    }
    attempt.succeeded();
}

void TrtRunner::check_finite(int64_t step) {
    Buffer const& logits = workspace_->buffer("logits");
    std::vector<float> values(logits.num_bytes() / sizeof(float));
    workspace_->queue().download(values.data(), workspace_->address("logits"),
                                 values.size() * sizeof(float));
    check_logits(values.data(), values.size(), step, config_.dtype);
}

SampledWindow TrtRunner::decode_window(Window const& window) {
    Attempt attempt(is_whole_);
    WindowPass& pass = workspace_->window_pass();
    if (!seeds_.empty()) {
        pass.start(seeds_, !needs_noise_);
        seeds_.clear();
    }
    evict_images(window);
    SampledWindow sampled = pass.run(window);
    int64_t const before = *std::min_element(window.first.begin(), window.first.end());
    int64_t after = config_.model.grid.num_tokens();
    for (size_t image = 0; image < window.first.size(); ++image) {
        after = std::min(after, window.first[image] + sampled.kept[image]);
    }
    if (after / config_.model.grid.width > before / config_.model.grid.width) {
        check_finite(after - 1);
    }
    attempt.succeeded();
    return sampled;
}

// Evicts what is due before each image's own step. Of other images no head is full, but for those
// that are due at another step, or done.
void TrtRunner::evict_images(Window const& window) {
    if (!workspace_->has_evictions()) {
        return;
    }
    size_t const images = window.first.size();
    std::map<int64_t, std::vector<size_t>> due;  // step -> rows
    bool all_are_active = true;
    for (size_t row = 0; row < static_cast<size_t>(workspace_->sizes().at("rows")); ++row) {
        bool const is_active = window.limit[row % images] > 0;
        int64_t const step = window.first[row % images];
        all_are_active = all_are_active && is_active;
        if (is_active && evictions_.count(step) > 0) {
            due[step].push_back(row);
        }
    }
    for (auto const& [step, rows] : due) {
        go_to(step);
        if (due.size() == 1 && all_are_active) {
            workspace_->launch_evict();
        } else {
            workspace_->evict_rows(rows);
        }
    }
}

std::vector<int32_t> TrtRunner::tokens() {
    Attempt attempt(is_whole_);
    auto const steps = static_cast<size_t>(config_.model.grid.num_tokens());
    auto const images = static_cast<size_t>(workspace_->sizes().at("images"));
    std::vector<int32_t> stored(steps * images);
    workspace_->queue().download(stored.data(), workspace_->address("tokens"),
                                 stored.size() * sizeof(int32_t));
    std::vector<int32_t> by_image(stored.size());
    for (size_t step = 0; step < steps; ++step) {
        for (size_t image = 0; image < images; ++image) {
            by_image[image * steps + step] = stored[step * images + image];
        }
    }
    attempt.succeeded();
    return by_image;
}

// As many images at a time as the engine takes, the rest one by one.
void TrtRunner::decode_image(int32_t const* codes, int64_t count, uint8_t* pixels) {
    Attempt attempt(is_whole_);
    if (workspace_ == nullptr || !workspace_->is_allocated()) {
        allocated(shared_->engines().files().manifest().batch.least, false);
    }
    ModelConfig const& model = config_.model;
    auto const num_tokens = static_cast<size_t>(model.grid.num_tokens());
    auto const levels = static_cast<size_t>(model.image_height() * model.image_width()) * 3;
    std::vector<float> made;
    for (int64_t start = 0; start < count;) {
        auto const next = std::prev(workspace_->decoders().upper_bound(count - start));
        auto const images = static_cast<size_t>(next->first);
        GraphContext& decoder = *next->second;
        int32_t const* const from = codes + static_cast<size_t>(start) * num_tokens;
        workspace_->upload("codes", std::vector<int32_t>(from, from + images * num_tokens),
                           decoder.name());
        decoder.enqueue();
        Buffer const& result = workspace_->buffer("pixels", decoder.name());
        made.resize(images * levels);
        if (result.dtype != Dtype::float32 || result.num_bytes() != made.size() * sizeof(float)) {
            fail(SSD_BAD_BUNDLE,
                 "image_decoder makes no pixels of the bundle's size; export the bundle again");
        }
        workspace_->queue().download(made.data(), workspace_->address("pixels", decoder.name()),
                                     result.num_bytes());
        to_pixels(made.data(), made.size(), config_.dtype,
                  pixels + static_cast<size_t>(start) * levels);
        start += next->first;
    }
    attempt.succeeded();
}

class TrtBackend : public Backend {
public:
    TrtBackend(Bundle const& bundle, Nvinfer const& nvinfer, int device)
        : shared_(std::make_shared<SharedEngines>(bundle, nvinfer, device)) {}

    std::unique_ptr<Runner> make_runner() override { return std::make_unique<TrtRunner>(shared_); }
    uint32_t max_images() const override {
        return static_cast<uint32_t>(files().manifest().batch.most);
    }
    void estimate(uint32_t, ssd_memory_plan& plan) const override;

private:
    EngineFiles const& files() const { return shared_->engines().files(); }

    std::shared_ptr<SharedEngines> shared_;
};

// peak_bytes: of the device. The image decoder takes its own number of images at a time.
void TrtBackend::estimate(uint32_t, ssd_memory_plan& plan) const {
    plan.weight_bytes = shared_->engines().weight_bytes() + files().num_bytes();
    plan.decoder_bytes =
        files().has(image_decoder) ? files().entry(image_decoder).activation_bytes : 0;
    plan.peak_bytes = plan.weight_bytes + Workspace::planned_bytes(files(), plan.num_images);
    plan.free_bytes = shared_->engines().device().free_bytes();
}

}  // namespace

std::unique_ptr<Backend> open_trt_backend(Bundle const& bundle, Nvinfer const& (*open_library)(),
                                          std::string const& provider, int device) {
    if (!provider.empty() && provider != "cuda") {
        fail(SSD_INVALID_ARGUMENT, "unknown provider ", in_quotes(provider),
             "; TensorRT runs on cuda alone");
    }
    CudaDriver::get();  // a machine without a GPU hears of that first
    need_engines(bundle);
    return std::make_unique<TrtBackend>(bundle, open_library(), device);
}

}  // namespace ssd_runtime
