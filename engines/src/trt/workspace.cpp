#include "trt/workspace.h"

#include <algorithm>
#include <list>
#include <numeric>

#include "cache_names.h"
#include "failure.h"

namespace ssd_runtime {
namespace {

char const evict_graph[] = "evict";
constexpr unsigned char empty = 0xFF;  // every byte of the position -1

bool has_own_evictions(EngineFiles const& files) {
    return files.bundle().config().graphs.count(evict_graph) > 0 && !files.evicts_in_step();
}

// Numbers for the named dimensions. The prompt has always its greatest length: with fixed shapes
// nothing is planned or compiled again.
Sizes sizes_of(EngineFiles const& files, std::string const& graph, int64_t num_images) {
    Sizes sizes = {{"images", num_images}};
    if (graph != image_decoder) {
        sizes["rows"] = files.bundle().config().model.rows_per_image * num_images;
    }
    if (starts_with(graph, "prefill")) {
        sizes["prompt_tokens"] = files.manifest().prompt_slots;
    }
    return sizes;
}

std::vector<int64_t> decoder_counts(EngineFiles const& files, int64_t num_images) {
    int64_t const at_a_time = files.decoder_images();
    if (at_a_time > 1 && num_images >= at_a_time) {
        return {1, at_a_time};
    }
    return {1};
}

}  // namespace

Workspace::Workspace(std::shared_ptr<LoadedEngines> engines)
    : engines_(std::move(engines)),
      queue_(engines_->device()),
      noise_(queue_, engines_->config().model) {}

Workspace::~Workspace() {
    queue_.try_synchronize();
    engines_->device().try_use();
}

void Workspace::allocate(int64_t num_images, bool top_k) {
    if (is_allocated() && num_images_ == num_images && top_k_ == top_k) {
        return;
    }
    EngineFiles const& files = engines_->files();
    check_batch(files.manifest(), num_images, files.bundle());
    window_.reset();
    work_.clear();
    memory_.reset();
    num_images_ = num_images;
    top_k_ = top_k;
    std::string const suffix = top_k ? "_top_k" : "";
    sizes_ = sizes_of(files, "decode_step", num_images);
    prefill_ = &context("prefill" + suffix, num_images);
    prompt_sizes_.clear();
    for (int64_t const size : ssd_runtime::prompt_sizes(num_images)) {
        bool const is_taken = files.manifest().batch.least <= size;
        if (is_taken && &context("prefill" + suffix, size) == prefill_) {
            prompt_sizes_.push_back(size);
        }
    }
    decode_ = &context("decode_step" + suffix, num_images);
    evict_ = has_own_evictions(files) ? &context(evict_graph, num_images) : nullptr;
    std::vector<GraphContext*> contexts = {decode_, prefill_};
    decoders_.clear();
    for (int64_t const count : decoder_counts(files, num_images)) {
        decoders_[count] = &context(image_decoder, count);
        contexts.push_back(decoders_[count]);
        decoders_[count]->set_sizes(sizes_of(files, image_decoder, count));
    }
    if (evict_ != nullptr) {
        contexts.push_back(evict_);
    }
    plan_memory(contexts);
    try_out();
    prepare_work();
}

GraphContext& Workspace::context(std::string const& graph, int64_t num_images) {
    EngineFiles const& files = engines_->files();
    std::pair<std::string, int32_t> const key = {graph, files.profile_for(graph, num_images)};
    auto const found = contexts_.find(key);
    if (found != contexts_.end()) {
        return *found->second;
    }
    return *contexts_.emplace(key, engines_->new_context(graph, num_images, queue_.stream()))
                .first->second;
}

void Workspace::plan_memory(std::vector<GraphContext*> const& contexts) {
    EngineFiles const& files = engines_->files();
    std::vector<PlannedGraph> graphs;
    for (GraphContext* const context : contexts) {
        int64_t count = num_images_;
        for (auto const& [images, decoder] : decoders_) {
            count = decoder == context ? images : count;
        }
        Sizes const sizes = sizes_of(files, context->spec().name, count);
        engines_->device().use();
        context->set_sizes(sizes);
        graphs.push_back({context->name(), &context->spec(), &context->aliases(), sizes,
                          context->scratch_bytes()});
    }
    plan_ = plan_buffers(graphs);
    check_device_memory(text("a batch of ", num_images_), plan_.num_bytes,
                        engines_->device().free_bytes());
    memory_ = std::make_unique<DeviceMemory>(engines_->device(), plan_.num_bytes);
    for (GraphContext* const context : contexts) {
        bind(*context);
    }
}

void Workspace::bind(GraphContext& context) {
    auto const& [offset, num_bytes] = plan_.scratch.at(context.name());
    context.use_scratch(memory_->address() + offset, num_bytes);
    for (auto const* side : {&context.spec().inputs, &context.spec().outputs}) {
        for (TensorSpec const& tensor : *side) {
            auto const alias = context.aliases().find(tensor.name);
            context.bind(tensor.name,
                         address(alias == context.aliases().end() ? tensor.name : alias->second,
                                 context.name()));
        }
    }
}

// Runs on empty caches what will be captured: TensorRT loads and compiles kernels on the first run.
void Workspace::try_out() {
    clear();
    upload("prompt_length", std::vector<int32_t>(static_cast<size_t>(sizes_.at("rows")), 1));
    upload("step", std::vector<int64_t>{1});
    queue_evict();
    queue_step();
    queue_.synchronize();
}

void Workspace::prepare_work() {
    bool const captures =
        decode_->is_capturable() && (evict_ == nullptr || evict_->is_capturable());
    auto const add = [&](Work kind, std::function<void()> work) {
        work_.emplace(kind, CapturedWork(queue_, std::move(work), captures));
    };
    add(Work::step, [this] { queue_step(); });
    add(Work::evict, [this] { queue_evict(); });
    add(Work::evict_and_step, [this] {
        queue_evict();
        queue_step();
    });
}

void Workspace::clear() {
    for (auto const& [name, shared] : plan_.shared) {
        bool const is_position = (is_past(name) || is_present(name)) && kind_of(name) == "position";
        queue_.fill(memory_->address() + shared.offset, is_position ? empty : 0,
                    shared.num_bytes());
    }
}

void Workspace::run_prefill(std::vector<float> const& embeds, std::vector<int32_t> const& lengths) {
    upload_first("inputs_embeds", embeds, prefill_->name());
    upload_first("prompt_length", lengths);
    resize_prefill(static_cast<int64_t>(lengths.size()) / engines_->config().model.rows_per_image);
    prefill_->enqueue();
}

// Gives the prefill a number of images that it was planned for, or fewer, in the same memory.
void Workspace::resize_prefill(int64_t num_images) {
    engines_->device().use();
    prefill_->set_sizes(sizes_of(engines_->files(), prefill_->spec().name, num_images));
    auto const& [offset, planned] = plan_.scratch.at(prefill_->name());
    uint64_t const needed = prefill_->scratch_bytes();
    if (needed > planned) {
        fail(SSD_INTERNAL_ERROR, "TensorRT asks for ", needed, " bytes to run ", prefill_->name(),
             " with ", num_images, " images, and for ", planned, " with ", num_images_);
    }
    prefill_->use_scratch(memory_->address() + offset, planned);
}

void Workspace::fill_caches(std::vector<int32_t> const& lengths, std::vector<size_t> const& place) {
    Buffer const& pattern = buffer(prompt_positions, prefill_->name());
    auto const tokens = static_cast<size_t>(pattern.shape.at(2));
    std::vector<int32_t> positions(num_elements(pattern.shape));
    for (size_t start = 0; start < positions.size(); start += tokens) {
        std::iota(positions.begin() + static_cast<std::ptrdiff_t>(start),
                  positions.begin() + static_cast<std::ptrdiff_t>(start + tokens), 0);
    }
    upload(prompt_positions, positions, prefill_->name());
    std::vector<size_t> own_place(lengths.size());
    std::iota(own_place.begin(), own_place.end(), size_t{0});
    auto const in_place = copies_in_place(place, tokens);
    auto const returned = copies_from_prompts(place, lengths);
    auto const patterns = copies_from_prompts(own_place, lengths);
    for (TensorSpec const& tensor : decode_->spec().inputs) {
        if (is_past(tensor.name)) {
            bool const is_there = prefill_->aliases().count(present_of(tensor.name)) > 0;
            bool const is_position = kind_of(tensor.name) == "position";
            copy_prompts(tensor.name, is_there ? in_place : is_position ? patterns : returned);
        }
    }
}

void Workspace::copy_prompts(std::string const& past, std::vector<RowCopy> const& copies) {
    Buffer const& cache = buffer(past);
    if (cache.shape.size() < 3 || cache.shape[0] != sizes_.at("rows")) {
        fail(SSD_BAD_BUNDLE, "the bundle's ", past,
             " is no cache of rows, heads and slots; export the bundle again");
    }
    auto const heads = static_cast<size_t>(cache.shape[1]);
    size_t const pitch = cache.num_bytes() / static_cast<size_t>(cache.shape[0]) / heads;
    size_t const slot_bytes = pitch / static_cast<size_t>(cache.shape[2]);
    size_t const prompt_pitch =
        static_cast<size_t>(engines_->files().manifest().prompt_slots) * slot_bytes;
    std::string const source = kind_of(past) == "position" ? prompt_positions : present_of(past);
    for (RowCopy const& copy : copies) {
        DeviceQueue::Rows const from =
            copy.is_of_prompts
                ? DeviceQueue::Rows{address(source, prefill_->name()) +
                                        copy.source * heads * prompt_pitch,
                                    prompt_pitch}
                : DeviceQueue::Rows{address(past) + copy.source * heads * pitch, pitch};
        queue_.copy_rows({address(past) + copy.target * heads * pitch, pitch}, from,
                         copy.length * slot_bytes, copy.count * heads);
    }
}

std::vector<float> Workspace::download_first(std::string const& tensor, size_t count) {
    check_fits(tensor, "", count * sizeof(float));
    std::vector<float> numbers(count);
    queue_.download(numbers.data(), address(tensor), count * sizeof(float));
    return numbers;
}

void Workspace::check_size(std::string const& tensor, std::string const& context,
                           size_t size) const {
    uint64_t const capacity = plan_.buffer(tensor, context).num_bytes();
    if (capacity != size) {
        fail(SSD_BAD_BUNDLE, "the bundle's ", tensor, " has ", capacity,
             " bytes where this ssd_runtime makes ", size, "; export the bundle again");
    }
}

void Workspace::check_fits(std::string const& tensor, std::string const& context,
                           size_t size) const {
    uint64_t const capacity = plan_.buffer(tensor, context).num_bytes();
    if (capacity < size) {
        fail(SSD_BAD_BUNDLE, "the bundle's ", tensor, " has ", capacity,
             " bytes where this ssd_runtime needs ", size, "; export the bundle again");
    }
}

uint64_t Workspace::cache_bytes() const {
    uint64_t sum = 0;
    for (TensorSpec const& tensor : decode_->spec().inputs) {
        sum += is_past(tensor.name) ? buffer(tensor.name).num_bytes() : 0;
    }
    return sum;
}

void Workspace::launch_step(bool evict) {
    work_.at(evict && has_evictions() ? Work::evict_and_step : Work::step).launch();
}

bool Workspace::step_is_captured() const {
    bool const all = std::all_of(work_.begin(), work_.end(),
                                 [](auto const& work) { return work.second.captures(); });
    return !work_.empty() && all && (window_ == nullptr || window_->is_captured());
}

void Workspace::queue_step() { run(*decode_); }

// Nothing where the decode step evicts by itself (R7).
void Workspace::queue_evict() {
    if (has_evictions()) {
        run(*evict_);
    }
}

void Workspace::evict_rows(std::vector<size_t> const& rows) {
    engines_->device().use();
    evict_->enqueue();
    for (auto const& [output, past] : carried(evict_->spec(), evict_->aliases())) {
        Buffer const &target = buffer(past), &source = buffer(output, evict_->name());
        size_t const size = target.num_bytes() / static_cast<size_t>(target.shape.at(0));
        for (size_t const row : rows) {
            queue_.copy(memory_->address() + target.offset + row * size,
                        memory_->address() + source.offset + row * size, size);
        }
    }
}

WindowPass& Workspace::window_pass() {
    if (window_ == nullptr) {
        EngineFiles const& files = engines_->files();
        int64_t const most = files.window_images();
        if (num_images_ > most) {
            fail(SSD_INVALID_ARGUMENT, "engines take passes of lookahead for up to ", most,
                 " images at once, not ", num_images_, "; use max_batch ", most,
                 ", or lookahead 1");
        }
        Sizes sizes = sizes_;
        sizes["window"] = files.window();
        window_ = std::make_unique<WindowPass>(
            queue_, context(std::string(window_graph) + (top_k_ ? "_top_k" : ""), num_images_),
            sizes, plan_, *memory_, noise_.windows());
    }
    return *window_;
}

// Queues a graph, then the copies of what it leaves for the next run beside its inputs.
void Workspace::run(GraphContext& context) {
    engines_->device().use();
    context.enqueue();
    for (Copy const& copy : plan_.copies.at(context.name())) {
        queue_.copy(memory_->address() + copy.target, memory_->address() + copy.source,
                    copy.num_bytes);
    }
}

uint64_t Workspace::planned_bytes(EngineFiles const& files, int64_t num_images) {
    std::vector<PlannedGraph> graphs;
    std::list<GraphSpec> contracts;
    auto const add = [&](std::string const& graph, int64_t count) {
        if (files.has(graph)) {
            EngineEntry const& entry = files.entry(graph);
            contracts.push_back(engine_contract(files.bundle().config(), graph, entry.aliases));
            graphs.push_back({graph, &contracts.back(), &entry.aliases,
                              sizes_of(files, graph, count), entry.activation_bytes});
        }
    };
    add("decode_step", num_images);
    add("prefill", num_images);
    add(image_decoder, decoder_counts(files, num_images).back());
    if (has_own_evictions(files)) {
        add(evict_graph, num_images);
    }
    return graphs.empty() ? 0 : plan_buffers(graphs).num_bytes;
}

}  // namespace ssd_runtime
