#include "ort/ort_runner.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cache_names.h"
#include "cuda_driver.h"
#include "failure.h"
#include "finite.h"
#include "machine.h"

namespace ssd_runtime {
namespace {

char const num_sorted_codes[] = "num_sorted_codes";
char const window_graph[] = "decode_window";

template <typename Item>
std::vector<std::byte> bytes_of(std::vector<Item> const& items) {
    auto const* begin = reinterpret_cast<std::byte const*>(items.data());
    return {begin, begin + items.size() * sizeof(Item)};
}

size_t size_in_bytes(Ort::Value const& value) {
    Ort::TensorTypeAndShapeInfo const info = value.GetTensorTypeAndShapeInfo();
    for (Dtype const dtype : all_dtypes) {
        if (ort_type(dtype) == info.GetElementType()) {
            return info.GetElementCount() * item_bytes(dtype);
        }
    }
    fail(SSD_INTERNAL_ERROR, "ONNX Runtime holds a tensor of a type that no bundle has");
}

// Prompt token t to slot t, everything else empty and zero (R8; 0 x NaN would be NaN).
class PromptSlots {
public:
    // shape: rows, heads, slots, and what a slot holds.
    PromptSlots(TensorSpec const& tensor, std::vector<int64_t> const& shape,
                PromptBatch const& batch)
        : lengths_(batch.lengths), width_(static_cast<size_t>(batch.width)) {
        if (shape.size() < 3 || shape[0] != static_cast<int64_t>(lengths_.size())) {
            fail(SSD_BAD_BUNDLE, "the bundle's ", tensor.name,
                 " is no cache of rows, heads and slots; export the bundle again");
        }
        heads_ = static_cast<size_t>(shape[1]);
        slots_ = static_cast<size_t>(shape[2]);
        slot_bytes_ = item_bytes(tensor.dtype) * num_elements({shape.begin() + 3, shape.end()});
    }

    // prompt: [rows, heads, width, ...], or NULL for positions.
    void write(std::byte const* prompt, std::byte* target, size_t size) const {
        std::memset(target, 0, size);
        for (size_t row = 0; row < lengths_.size(); ++row) {
            size_t const held = std::min(static_cast<size_t>(lengths_[row]), slots_);
            for (size_t head = row * heads_; head < (row + 1) * heads_; ++head) {
                std::byte* const to = target + head * slots_ * slot_bytes_;
                if (prompt == nullptr) {
                    write_positions(to, held);
                } else {
                    std::memcpy(to, prompt + head * width_ * slot_bytes_, held * slot_bytes_);
                }
            }
        }
    }

private:
    void write_positions(std::byte* target, size_t held) const {
        std::vector<int32_t> position(slots_, -1);
        std::iota(position.begin(), position.begin() + static_cast<std::ptrdiff_t>(held), 0);
        std::memcpy(target, position.data(), slots_ * sizeof(int32_t));
    }

    std::vector<int32_t> const& lengths_;
    size_t width_, heads_, slots_, slot_bytes_;
};

// What the process and ONNX Runtime take without any weights, and how many copies of the weights
// its kernels hold while they are packed (ssd_export/plan/memory.py measured both).
constexpr uint64_t base_bytes = 60'000'000;
constexpr double copies_float32 = 1.05, copies_half = 2.1, copies_of_codes = 1.5;
constexpr int64_t feature_maps = 5;  // of the image decoder's largest size that are alive at once

class OrtBackend : public Backend {
public:
    OrtBackend(Bundle const& bundle, std::shared_ptr<OrtSessions> sessions)
        : bundle_(bundle), sessions_(std::move(sessions)) {}

    std::unique_ptr<Runner> make_runner() override {
        return std::make_unique<OrtRunner>(bundle_, sessions_);
    }
    uint32_t max_images() const override { return UINT32_MAX; }
    std::string why_float_decoder() const override { return sessions_->why_float_decoder(); }
    void estimate(uint32_t decoder_batch, ssd_memory_plan& plan) const override;

private:
    uint64_t free_bytes() const {
        if (!sessions_->is_cuda()) {
            return machine_memory().free_bytes;
        }
        uint64_t free = 0;
        uint64_t total = 0;
        CudaDriver::get().use(sessions_->device());
        CudaDriver::get().memory_bytes(free, total);
        return free;
    }

    Bundle const& bundle_;
    std::shared_ptr<OrtSessions> sessions_;
};

void OrtBackend::estimate(uint32_t decoder_batch, ssd_memory_plan& plan) const {
    Config const& known = bundle_.config();
    bool const is_cpu = !sessions_->is_cuda();
    auto const pixels =
        static_cast<uint64_t>(known.model.image_height() * known.model.image_width());
    plan.weight_bytes = bundle_.num_bytes(known.text_embeddings.file);
    plan.decoder_bytes = feature_maps * uint64_t{decoder_batch} *
                         static_cast<uint64_t>(known.model.base_channels) * pixels *
                         (is_cpu ? sizeof(float) : item_bytes(known.dtype));
    double const copies = !is_cpu                         ? 1.0
                          : known.weight_format != "none" ? copies_of_codes
                          : known.dtype == Dtype::float32 ? copies_float32
                                                          : copies_half;
    plan.peak_bytes = base_bytes + plan.cache_bytes + plan.decoder_bytes +
                      static_cast<uint64_t>(copies * static_cast<double>(plan.weight_bytes));
    plan.free_bytes = free_bytes();
}

}  // namespace

std::unique_ptr<Backend> open_ort_backend(Bundle const& bundle, std::string const& provider,
                                          int device, int num_threads) {
    return std::make_unique<OrtBackend>(
        bundle, std::make_shared<OrtSessions>(bundle, provider, device, num_threads));
}

OrtRunner::OrtRunner(Bundle const& bundle, std::shared_ptr<OrtSessions> sessions)
    : config_(bundle.config()),
      sessions_(std::move(sessions)),
      host_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
      device_(
          sessions_->is_cuda()
              ? Ort::MemoryInfo("Cuda", OrtDeviceAllocator, sessions_->device(), OrtMemTypeDefault)
              : Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault)) {}

void OrtRunner::prefill(PromptBatch const& batch) {
    suffix_ = batch.sampling.top_k > 0 ? "_top_k" : "";
    std::string const graph = "prefill" + suffix_;
    bound_.clear();  // the decode step's session may have to make room
    allocate(batch.num_images(), "decode_step" + suffix_);
    noise_row_ = 0;
    images_ = batch.images;
    is_greedy_ = batch.sampling.temperature == 0;
    GraphSpec const& spec = config_.graph(graph);
    sizes_["prompt_tokens"] = batch.width;
    std::map<std::string, std::vector<std::byte>> contents;
    std::map<std::string, Ort::Value> feeds;
    for (TensorSpec const& tensor : inputs_of(spec)) {
        std::vector<std::byte>& content = contents[tensor.name];
        content = content_of(tensor, batch);
        feeds.emplace(tensor.name, on_host(tensor, content.data(), content.size(), sizes_));
        if (values_.count(tensor.name) > 0) {
            upload(tensor.name, content.data(), content.size());
        }
    }
    fill_caches(spec, run_once(graph, feeds), batch);
    plan_evictions(batch.lengths);
}

// The contract's inputs and, where codes are sorted for top-k, how many: an input with a default,
// beside the contract, which saves sorting those that no image asks for.
std::vector<TensorSpec> OrtRunner::inputs_of(GraphSpec const& spec) const {
    std::vector<TensorSpec> inputs = spec.inputs;
    if (spec.input("top_k") != nullptr) {
        inputs.push_back({num_sorted_codes, Dtype::int64, {{1, ""}}});
    }
    return inputs;
}

// What an input of the prefill holds, by its name.
std::vector<std::byte> OrtRunner::content_of(TensorSpec const& tensor,
                                             PromptBatch const& batch) const {
    size_t const count = num_elements(tensor.shape_with(sizes_));
    if (tensor.name == "inputs_embeds") {
        return bytes_of(batch.embeds);
    }
    if (tensor.name == "prompt_length") {
        return bytes_of(batch.lengths);
    }
    if (tensor.name == "noise") {
        return bytes_of(noise_of_row(0));
    }
    if (tensor.name == "cfg_scale") {
        return bytes_of(std::vector<float>(count, batch.sampling.cfg_scale));
    }
    if (tensor.name == "temperature") {
        return bytes_of(std::vector<float>(count, batch.sampling.temperature));
    }
    if (tensor.name == "top_k") {
        return bytes_of(std::vector<int64_t>(count, batch.sampling.top_k));
    }
    if (tensor.name == num_sorted_codes) {
        return bytes_of(std::vector<int64_t>(
            count, std::min(batch.sampling.top_k, config_.model.codebook_size)));
    }
    fail(SSD_BAD_BUNDLE, "the bundle's prefill has the unknown input ", tensor.name,
         "; use a newer ssd_runtime, or export the bundle again");
}

// Noise of a grid row, of which step s reads row s mod the grid's width; a greedy batch reads
// zeros.
std::vector<float> OrtRunner::noise_of_row(int64_t row) const {
    auto const codebook = static_cast<size_t>(config_.model.codebook_size);
    int64_t const width = config_.model.grid.width;
    std::vector<float> noise(static_cast<size_t>(width) * images_.size() * codebook);
    if (!is_greedy_) {
        fill_noise(images_, codebook, row * width, width, noise.data());
    }
    return noise;
}

std::vector<Ort::Value> OrtRunner::run_once(std::string const& graph,
                                            std::map<std::string, Ort::Value> const& feeds) {
    GraphSpec const& spec = config_.graph(graph);
    std::vector<char const*> inputs, outputs;
    std::vector<OrtValue const*> values;
    for (auto const& [name, value] : feeds) {
        inputs.push_back(name.c_str());
        values.push_back(value);
    }
    std::vector<OrtValue*> results(spec.outputs.size(), nullptr);
    for (TensorSpec const& tensor : spec.outputs) {
        outputs.push_back(tensor.name.c_str());
    }
    std::shared_ptr<Ort::Session> const session = sessions_->get(graph);
    Ort::ThrowOnError(Ort::GetApi().Run(*session, run_options_, inputs.data(), values.data(),
                                        values.size(), outputs.data(), outputs.size(),
                                        results.data()));
    std::vector<Ort::Value> owned;
    for (OrtValue* result : results) {
        owned.emplace_back(result);
    }
    return owned;
}

void OrtRunner::fill_caches(GraphSpec const& prefill, std::vector<Ort::Value> const& results,
                            PromptBatch const& batch) {
    std::map<std::string, void const*> made;
    for (size_t i = 0; i < results.size(); ++i) {
        TensorSpec const& tensor = prefill.outputs[i];
        if (results[i].GetTensorTypeAndShapeInfo().GetShape() != tensor.shape_with(sizes_)) {
            fail(SSD_BAD_BUNDLE, "graph ", prefill.name, " made ", tensor.name,
                 " of another shape than the bundle says; export the bundle again");
        }
        made[tensor.name] = results[i].GetTensorRawData();
    }
    auto const result = [&](std::string const& name) {
        auto const found = made.find(name);
        if (found == made.end()) {
            fail(SSD_BAD_BUNDLE, "graph ", prefill.name, " has no output ", name,
                 "; export the bundle again");
        }
        return static_cast<std::byte const*>(found->second);
    };
    auto const images = static_cast<size_t>(batch.num_images());
    std::byte const* const first_tokens = result("token");
    fill(values_.at("tokens"), [&](std::byte* target, size_t size) {
        std::memset(target, 0, size);
        std::memcpy(target, first_tokens, images * sizeof(int32_t));
    });
    for (TensorSpec const& tensor : config_.graph(step_graph_).inputs) {
        if (!is_past(tensor.name)) {
            continue;
        }
        bool const is_position = kind_of(tensor.name) == "position";
        std::byte const* const prompt = is_position ? nullptr : result(present_of(tensor.name));
        PromptSlots const slots(tensor, tensor.shape_with(sizes_), batch);
        fill(values_.at(tensor.name),
             [&](std::byte* target, size_t size) { slots.write(prompt, target, size); });
    }
}

// Calls write(host memory, bytes) for the content of a value; on the CPU that is the value itself.
template <typename Write>
void OrtRunner::fill(Ort::Value& value, Write write) {
    size_t const size = size_in_bytes(value);
    if (!sessions_->is_cuda()) {
        write(static_cast<std::byte*>(value.GetTensorMutableRawData()), size);
        return;
    }
    std::vector<std::byte> staging(size);
    write(staging.data(), size);
    CudaDriver::get().use(sessions_->device());
    CudaDriver::get().copy_to_device(value.GetTensorMutableRawData(), staging.data(), size);
}

void OrtRunner::plan_evictions(std::vector<int32_t> const& lengths) {
    evictions_.clear();
    for (EvictionKind const& kind : config_.policy.eviction_kinds()) {
        bool const has_own = config_.graphs.count(eviction_graph(kind)) > 0;
        std::string const graph = has_own ? eviction_graph(kind) : "evict";
        for (int64_t const step : config_.policy.full_before(kind, lengths)) {
            std::vector<std::string>& due = evictions_[step];
            if (std::find(due.begin(), due.end(), graph) == due.end()) {
                due.push_back(graph);
            }
        }
    }
}

void OrtRunner::decode_row(int64_t first, int64_t last, std::atomic<bool> const& stop) {
    int64_t const row = first / config_.model.grid.width;
    if (row != noise_row_ && !is_greedy_) {
        std::vector<float> const noise = noise_of_row(row);
        upload("noise", noise.data(), noise.size() * sizeof(float));
    }
    noise_row_ = row;
    for (int64_t step = first; step < last && !stop; ++step) {
        if (!sessions_->fuses(step_graph_)) {  // it evicts by itself
            evict(step);
        }
        run(step_graph_, step);
    }
    if (!stop) {
        check_finite(values_.at("logits"), last - 1);
    }
}

void OrtRunner::evict(int64_t step) {
    auto const due = evictions_.find(step);
    if (due == evictions_.end()) {
        return;
    }
    for (std::string const& graph : due->second) {
        run(graph, step);
        copy_back(config_.graph(graph));
    }
}

std::string OrtRunner::why_no_window() const {
    return config_.graphs.count(window_graph) > 0
               ? ""
               : "this bundle was exported without the graph that lookahead needs; export it again "
                 "with --force, or use lookahead 1";
}

SampledWindow OrtRunner::decode_window(Window const& window) {
    std::string const graph = window_graph + suffix_;
    evict_images(window);
    Values& values = window_values(graph, window.width());
    auto const give = [&](char const* name, auto const& items) {
        upload(name, values.at(name), items.data(), items.size() * sizeof(items[0]));
    };
    give("window_tokens", window.inputs);
    give("first", window.first);
    give("limit", window.limit);
    give("noise", window.noise());
    Bound& to_run = bound(graph, window.width());
    to_run.session->Run(run_options_, to_run.binding);
    SampledWindow sampled{items_of<int32_t>(values.at("sampled")),
                          items_of<int64_t>(values.at("kept"))};
    window.check_kept(graph, sampled.kept);
    std::vector<int32_t> tokens = items_of<int32_t>(values_.at("tokens"));
    size_t const images = window.first.size();
    for (size_t image = 0; image < images; ++image) {
        int64_t const first = window.first[image];
        for (int64_t place = 0; place < sampled.kept[image]; ++place) {
            tokens[static_cast<size_t>(first + place) * images + image] =
                sampled.tokens[image * static_cast<size_t>(window.width()) +
                               static_cast<size_t>(place)];
        }
    }
    upload("tokens", tokens.data(), tokens.size() * sizeof(int32_t));
    check_finite(values.at("logits"), *std::min_element(window.first.begin(), window.first.end()));
    return sampled;
}

// Evicts what is due before each image's own step.
void OrtRunner::evict_images(Window const& window) {
    size_t const images = window.first.size();
    if (images == 1) {
        evict(window.first[0]);
        return;
    }
    for (auto const& [step, graphs] : evictions_) {
        std::vector<size_t> rows;
        for (size_t row = 0; row < static_cast<size_t>(sizes_.at("rows")); ++row) {
            if (window.limit[row % images] > 0 && window.first[row % images] == step) {
                rows.push_back(row);
            }
        }
        for (size_t i = 0; i < graphs.size() && !rows.empty(); ++i) {
            evict_rows(graphs[i], step, rows);
        }
    }
}

// Runs an evict graph on some rows alone: others, at other steps, may be full as well.
void OrtRunner::evict_rows(std::string const& graph, int64_t step,
                           std::vector<size_t> const& rows) {
    GraphSpec const& spec = config_.graph(graph);
    std::map<std::string, int64_t> sizes = sizes_;
    auto const row_bytes = [this](size_t size) {
        return size / static_cast<size_t>(sizes_.at("rows"));
    };
    sizes["rows"] = static_cast<int64_t>(rows.size());
    std::map<std::string, std::vector<std::byte>> contents;
    std::map<std::string, Ort::Value> feeds;
    for (TensorSpec const& tensor : spec.inputs) {
        std::vector<std::byte>& content = contents[tensor.name];
        if (tensor.name == "step") {
            content = bytes_of(std::vector<int64_t>{step});
        } else {
            std::vector<std::byte> const every = download(values_.at(tensor.name));
            for (size_t const row : rows) {
                auto const begin =
                    every.begin() + static_cast<std::ptrdiff_t>(row * row_bytes(every.size()));
                content.insert(content.end(), begin,
                               begin + static_cast<std::ptrdiff_t>(row_bytes(every.size())));
            }
        }
        feeds.emplace(tensor.name, on_host(tensor, content.data(), content.size(), sizes));
    }
    std::vector<Ort::Value> const results = run_once(graph, feeds);
    for (size_t i = 0; i < results.size(); ++i) {
        std::string const past = past_of(spec.outputs[i].name);
        std::vector<std::byte> every = download(values_.at(past));
        auto const* made = static_cast<std::byte const*>(results[i].GetTensorRawData());
        size_t const size = row_bytes(every.size());
        if (size_in_bytes(results[i]) != rows.size() * size) {
            fail(SSD_BAD_BUNDLE, "graph ", graph, " made ", spec.outputs[i].name,
                 " of another size than the bundle says; export the bundle again");
        }
        for (size_t place = 0; place < rows.size(); ++place) {
            std::memcpy(every.data() + rows[place] * size, made + place * size, size);
        }
        upload(past, every.data(), every.size());
    }
}

// Values that decode_window has for itself at this width; all else it shares with the steps.
OrtRunner::Values& OrtRunner::window_values(std::string const& graph, int64_t width) {
    auto const found = windows_.find(width);
    if (found != windows_.end()) {
        return found->second;
    }
    GraphSpec const& spec = config_.graph(graph);
    std::map<std::string, int64_t> sizes = sizes_;
    sizes["window"] = width;
    Values made;
    for (std::vector<TensorSpec> const* tensors : {&spec.inputs, &spec.outputs}) {
        for (TensorSpec const& tensor : *tensors) {
            bool const is_own = tensor.name == "noise" || tensor.name == "logits" ||
                                values_.count(tensor.name) == 0;
            if (is_own && spec.aliases.count(tensor.name) == 0) {
                made.emplace(tensor.name, new_value(tensor, sizes));
            }
        }
    }
    for (char const* name :
         {"window_tokens", "first", "limit", "noise", "sampled", "kept", "logits"}) {
        if (made.count(name) == 0) {
            fail(SSD_BAD_BUNDLE, "graph ", graph, " has no tensor ", name,
                 "; export the bundle again");
        }
    }
    return windows_.emplace(width, std::move(made)).first->second;
}

std::vector<std::byte> OrtRunner::download(Ort::Value const& value) const {
    std::vector<std::byte> content(size_in_bytes(value));
    if (sessions_->is_cuda()) {
        CudaDriver::get().use(sessions_->device());
        CudaDriver::get().copy_to_host(content.data(), value.GetTensorRawData(), content.size());
    } else {
        std::memcpy(content.data(), value.GetTensorRawData(), content.size());
    }
    return content;
}

template <typename Item>
std::vector<Item> OrtRunner::items_of(Ort::Value const& value) const {
    std::vector<std::byte> const content = download(value);
    std::vector<Item> items(content.size() / sizeof(Item));
    std::memcpy(items.data(), content.data(), items.size() * sizeof(Item));
    return items;
}

void OrtRunner::check_finite(Ort::Value const& logits, int64_t step) const {
    std::vector<float> const values = items_of<float>(logits);
    check_logits(values.data(), values.size(), step, config_.dtype);
}

void OrtRunner::run(std::string const& graph, int64_t step) {
    upload("step", &step, sizeof step);
    Bound& to_run = bound(graph);
    to_run.session->Run(run_options_, to_run.binding);
}

// Scores that an eviction changes are not aliased: nothing orders their write after the ranking.
void OrtRunner::copy_back(GraphSpec const& evict) {
    for (TensorSpec const& tensor : evict.outputs) {
        if (evict.is_aliased(tensor)) {
            continue;
        }
        Ort::Value const& changed = values_.at(tensor.name);
        size_t const size = size_in_bytes(changed);
        if (!sessions_->is_cuda()) {
            upload(past_of(tensor.name), changed.GetTensorRawData(), size);
            continue;
        }
        upload(past_of(tensor.name), download(changed).data(), size);
    }
}

// width: of a window, whose values are its own; 0 for other graphs.
OrtRunner::Bound& OrtRunner::bound(std::string const& graph, int64_t width) {
    std::string const key = width > 0 ? text(graph, " of ", width) : graph;
    auto const found = bound_.find(key);
    if (found != bound_.end()) {
        return found->second;
    }
    for (auto it = bound_.begin(); it != bound_.end() && sessions_->holds_one();) {
        bool const makes_room = holds_language_model(graph) && it->second.spec->name != graph &&
                                holds_language_model(it->first);
        it = makes_room ? bound_.erase(it) : std::next(it);
    }
    GraphSpec const& spec = config_.graph(graph);
    std::shared_ptr<Ort::Session> session = sessions_->get(graph);
    Ort::IoBinding binding(*session);
    auto const value = [&](std::string const& name) -> Ort::Value const& {
        if (width > 0 && windows_.at(width).count(name) > 0) {
            return windows_.at(width).at(name);
        }
        auto const held = values_.find(name);
        if (held == values_.end()) {
            fail(SSD_BAD_BUNDLE, "graph ", graph, " has the unknown tensor ", name,
                 "; use a newer ssd_runtime, or export the bundle again");
        }
        return held->second;
    };
    for (TensorSpec const& tensor : inputs_of(spec)) {
        binding.BindInput(tensor.name.c_str(), value(tensor.name));
    }
    for (TensorSpec const& tensor : spec.outputs) {
        auto const alias = spec.aliases.find(tensor.name);
        binding.BindOutput(tensor.name.c_str(),
                           value(alias == spec.aliases.end() ? tensor.name : alias->second));
    }
    return bound_.emplace(key, Bound{&spec, session, std::move(binding)}).first->second;
}

void OrtRunner::allocate(int64_t num_images, std::string const& step_graph) {
    std::map<std::string, int64_t> const sizes = {
        {"images", num_images}, {"rows", config_.model.rows_per_image * num_images}};
    bool const fits = step_graph_ == step_graph && sizes_["images"] == num_images;
    step_graph_ = step_graph;
    sizes_ = sizes;
    if (fits) {
        return;
    }
    values_.clear();
    windows_.clear();
    allocator_.reset();
    allocator_ = std::make_unique<Ort::Allocator>(*sessions_->get("prefill"), device_);
    std::vector<GraphSpec const*> graphs = {&config_.graph(step_graph)};
    if (config_.graphs.count("evict") > 0) {
        graphs.push_back(&config_.graph("evict"));
    }
    for (GraphSpec const* graph : graphs) {
        for (TensorSpec const& tensor : inputs_of(*graph)) {
            if (values_.count(tensor.name) == 0) {
                values_.emplace(tensor.name, new_value(tensor, sizes_));
            }
        }
        for (TensorSpec const& tensor : graph->outputs) {
            if (!graph->is_aliased(tensor) && values_.count(tensor.name) == 0) {
                values_.emplace(tensor.name, new_value(tensor, sizes_));
            }
        }
    }
}

Ort::Value OrtRunner::new_value(TensorSpec const& tensor,
                                std::map<std::string, int64_t> const& sizes) {
    std::vector<int64_t> const shape = tensor.shape_with(sizes);
    num_elements(shape);  // refuses what no machine could hold
    return Ort::Value::CreateTensor(*allocator_, shape.data(), shape.size(),
                                    ort_type(tensor.dtype));
}

Ort::Value OrtRunner::on_host(TensorSpec const& tensor, void* data, size_t size,
                              std::map<std::string, int64_t> const& sizes) const {
    std::vector<int64_t> const shape = tensor.shape_with(sizes);
    if (num_elements(shape) * item_bytes(tensor.dtype) != size) {
        fail(SSD_BAD_BUNDLE, "the bundle's ", tensor.name,
             " has another size than this ssd_runtime makes; export the bundle again");
    }
    return Ort::Value::CreateTensor(host_, data, size, shape.data(), shape.size(),
                                    ort_type(tensor.dtype));
}

void OrtRunner::upload(std::string const& name, void const* data, size_t size) {
    upload(name, values_.at(name), data, size);
}

void OrtRunner::upload(std::string const& name, Ort::Value& value, void const* data, size_t size) {
    fill(value, [&](std::byte* target, size_t capacity) {
        if (size != capacity) {
            fail(SSD_BAD_BUNDLE, "the bundle's ", name, " has ", capacity,
                 " bytes where this ssd_runtime makes ", size, "; export the bundle again");
        }
        std::memcpy(target, data, size);
    });
}

std::vector<int32_t> OrtRunner::tokens() {
    auto const steps = static_cast<size_t>(config_.model.grid.num_tokens());
    auto const images = static_cast<size_t>(sizes_.at("images"));
    std::vector<int32_t> const stored = items_of<int32_t>(values_.at("tokens"));
    std::vector<int32_t> by_image(stored.size());
    for (size_t step = 0; step < steps; ++step) {
        for (size_t image = 0; image < images; ++image) {
            by_image[image * steps + step] = stored[step * images + image];
        }
    }
    return by_image;
}

void OrtRunner::decode_image(int32_t const* codes, int64_t count, uint8_t* pixels) {
    std::string const& graph = sessions_->image_decoder();
    GraphSpec const& spec = config_.graph(graph);
    TensorSpec const codes_spec{
        "codes", Dtype::int32, {{count, ""}, {config_.model.grid.num_tokens(), ""}}};
    size_t const num_codes = static_cast<size_t>(count * config_.model.grid.num_tokens());
    std::map<std::string, Ort::Value> feeds;
    feeds.emplace("codes", on_host(codes_spec, const_cast<int32_t*>(codes),
                                   num_codes * sizeof(int32_t), sizes_));
    std::vector<Ort::Value> const results = run_once(graph, feeds);
    std::vector<int64_t> const wanted = {count, config_.model.image_height(),
                                         config_.model.image_width(), 3};
    if (spec.outputs.size() != 1 || spec.outputs[0].dtype != Dtype::float32 ||
        results[0].GetTensorTypeAndShapeInfo().GetShape() != wanted) {
        fail(SSD_BAD_BUNDLE, graph,
             " made no pixels of the bundle's size; export the bundle again");
    }
    to_pixels(results[0].GetTensorData<float>(), num_elements(wanted), config_.dtype, pixels);
}

uint64_t OrtRunner::cache_bytes() const {
    uint64_t sum = 0;
    for (TensorSpec const& tensor : config_.graph(step_graph_).inputs) {
        if (is_past(tensor.name)) {
            sum += size_in_bytes(values_.at(tensor.name));
        }
    }
    return sum;
}

}  // namespace ssd_runtime
