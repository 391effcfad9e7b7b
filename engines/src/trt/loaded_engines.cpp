#include "trt/loaded_engines.h"

#include <algorithm>
#include <set>

#include "failure.h"
#include "files.h"

namespace ssd_runtime {
namespace {

constexpr size_t digest_bytes = 32, max_kernel_bytes = size_t{1} << 30U;
char const build_again[] = "build the engines again with build-engine";

EngineFiles files_of(Bundle const& bundle, Nvinfer const& nvinfer, CudaDevice const& device) {
    return find_engines(bundle, {nvinfer.flavor(), nvinfer.version(), device.compute_capability()});
}

std::string shape_text(std::vector<int64_t> const& shape) {
    std::string joined;
    for (int64_t const size : shape) {
        joined += (joined.empty() ? "" : ", ") + std::to_string(size);
    }
    return "(" + joined + ")";
}

// A hash that no other engines have, as Python writes it in front of a runtime cache.
std::string digest(EngineManifest const& manifest) {
    std::string listing;
    for (auto const& [graph, entry] : manifest.graphs) {
        listing += (listing.empty() ? "" : ", ") + text("('", graph, "', '", entry.sha256, "')");
    }
    return sha256_of_text("[" + listing + "]");
}

std::string hexadecimal(std::string const& bytes) {
    static char const digits[] = "0123456789abcdef";
    std::string hex;
    for (char const byte : bytes) {
        hex += digits[static_cast<unsigned char>(byte) >> 4U];
        hex += digits[static_cast<unsigned char>(byte) & 15U];
    }
    return hex;
}

}  // namespace

GraphContext::GraphContext(Nvinfer const& nvinfer, EngineFiles const& files, GraphSpec const& spec,
                           Engine const& engine, std::unique_ptr<ExecutionContext> context,
                           int32_t profile, CudaStream stream)
    : nvinfer_(nvinfer),
      files_(files),
      spec_(spec),
      engine_(engine),
      context_(std::move(context)),
      name_(text(spec.name, ".", profile)),
      stream_(stream) {
    must(context_->set_profile(profile, stream_), text("profile ", profile));
}

void GraphContext::set_sizes(Sizes const& sizes) {
    for (TensorSpec const& tensor : spec_.inputs) {
        bool const has_names =
            std::any_of(tensor.shape.begin(), tensor.shape.end(),
                        [](Dimension const& dimension) { return dimension.number < 0; });
        if (has_names) {
            std::vector<int64_t> const shape =
                engine_shape(spec_, tensor, files_.manifest().form, sizes);
            must(context_->set_input_shape(tensor.name, shape),
                 text("shape ", shape_text(shape), " of ", tensor.name));
        }
    }
}

uint64_t GraphContext::scratch_bytes() {
    size_t const needed = context_->scratch_bytes();
    return needed > 0 ? needed : engine_.scratch_bytes();
}

void GraphContext::use_scratch(DeviceAddress address, uint64_t num_bytes) {
    context_->use_scratch(address, num_bytes);
}

void GraphContext::bind(std::string const& tensor, DeviceAddress address) {
    must(context_->bind(tensor, address), "the buffer of " + tensor);
}

void GraphContext::enqueue() { must(context_->enqueue(stream_), "a run"); }

void GraphContext::must(bool answer, std::string const& what) const {
    if (!answer) {
        fail(SSD_INTERNAL_ERROR, "TensorRT refused ", what, " of ", spec_.name, ": ",
             nvinfer_.reason());
    }
}

LoadedEngines::LoadedEngines(Bundle const& bundle, Nvinfer const& nvinfer, int device)
    : device_(device), nvinfer_(nvinfer), files_(files_of(bundle, nvinfer, device_)) {
    for (auto const& [graph, entry] : files_.manifest().graphs) {
        if (config().graphs.count(graph) > 0) {
            contracts_.emplace(graph, engine_contract(config(), graph, entry.aliases));
        }
    }
    std::string const plugin = files_.plugin_library();
    device_.use();
    bool const host_code = files_.evicts_in_step() && plugin.empty();
    runtime_ = nvinfer_.new_runtime(host_code);
    if (runtime_ == nullptr) {
        fail(SSD_UNAVAILABLE, nvinfer_.flavor(), " ", nvinfer_.version(), " cannot start here (",
             nvinfer_.reason(), "); nvidia-smi shows whether GPU and driver work");
    }
    if (!plugin.empty() && !nvinfer_.load_plugin(plugin)) {  // the runtime says why
        fail(SSD_UNAVAILABLE, plugin, " does not load into ", nvinfer_.flavor(), " ",
             nvinfer_.version(), " (", nvinfer_.reason(), "); ", rebuild(bundle));
    }
    place_weights();
}

LoadedEngines::~LoadedEngines() { device_.try_use(); }

void LoadedEngines::place_weights() {
    std::map<std::string, StoredWeight> const weights = files_.weights();
    std::map<std::string, uint64_t> offsets;
    for (auto const& [name, weight] : weights) {
        offsets[name] = weight_bytes_;
        weight_bytes_ = aligned(weight_bytes_ + weight.num_bytes);
    }
    check_device_memory("the model", weight_bytes_ + files_.num_bytes(), device_.free_bytes());
    weights_ = std::make_unique<DeviceMemory>(device_, std::max<uint64_t>(weight_bytes_, 1));
    std::string const path = files_.weights_path();
    MappedFile const stored(path);
    DeviceQueue queue(device_);
    for (auto const& [name, weight] : weights) {
        if (weight.offset > stored.size() || weight.num_bytes > stored.size() - weight.offset) {
            fail(SSD_BAD_BUNDLE, path, " ends before ", name, "; ", rebuild(files_.bundle()));
        }
        addresses_[name] = weights_->address() + offsets[name];
        queue.upload(addresses_[name], stored.data() + weight.offset, weight.num_bytes);
    }
    queue.synchronize();
}

std::unique_ptr<GraphContext> LoadedEngines::new_context(std::string const& graph,
                                                         int64_t num_images, CudaStream stream) {
    std::lock_guard<std::mutex> const lock(mutex_);
    device_.use();
    Engine& loaded = engine(graph);
    int32_t const profile = files_.profile_for(graph, num_images);
    if (kernels_ == nullptr) {
        kernels_ = loaded.new_kernel_cache();
        read_kernels();
    }
    nvinfer_.forget_reason();
    std::unique_ptr<ExecutionContext> made = loaded.new_context(kernels_.get());
    if (made == nullptr) {
        fail(SSD_OUT_OF_MEMORY, "TensorRT cannot run ", graph, " here (", nvinfer_.reason(),
             "); free device memory, or use the backend onnxruntime");
    }
    auto context = std::make_unique<GraphContext>(nvinfer_, files_, contract(graph), loaded,
                                                  std::move(made), profile, stream);
    for (auto const& [name, weight] : files_.entry(graph).weights) {
        context->bind(name, addresses_.at(name));
    }
    return context;
}

Engine& LoadedEngines::engine(std::string const& graph) {
    auto const found = engines_.find(graph);
    if (found != engines_.end()) {
        return *found->second;
    }
    std::string const path = files_.path(graph);
    MappedFile const content(path);
    nvinfer_.forget_reason();
    std::unique_ptr<Engine> loaded = runtime_->deserialize(content.data(), content.size());
    if (loaded == nullptr) {
        fail(SSD_UNAVAILABLE, "TensorRT cannot load ", path, " (", nvinfer_.reason(), "); ",
             build_again);
    }
    check_tensors(*loaded, graph, path);
    return *engines_.emplace(graph, std::move(loaded)).first->second;
}

// The engine's names and types must be the contract's and the weights': everything is bound by
// them.
void LoadedEngines::check_tensors(Engine const& engine, std::string const& graph,
                                  std::string const& path) const {
    std::map<std::string, std::optional<Dtype>> wanted;
    GraphSpec const& spec = contract(graph);
    for (auto const* side : {&spec.inputs, &spec.outputs}) {
        for (TensorSpec const& tensor : *side) {
            wanted[tensor.name] = tensor.dtype;
        }
    }
    for (auto const& [name, weight] : files_.entry(graph).weights) {
        wanted[name] = std::nullopt;  // of the builder's choice
    }
    std::set<std::string> different;
    for (EngineTensor const& tensor : engine.tensors()) {
        auto const found = wanted.find(tensor.name);
        bool const is_known = found != wanted.end();
        bool const is_like = is_known && (!found->second || found->second == tensor.dtype);
        if (!is_like || !tensor.is_on_device) {
            different.insert(tensor.name);
        }
        if (is_known) {
            wanted.erase(found);
        }
    }
    for (auto const& [name, dtype] : wanted) {
        different.insert(name);
    }
    if (!different.empty()) {
        std::string names;
        size_t shown = 0;
        for (auto it = different.begin(); it != different.end() && shown < 3; ++it, ++shown) {
            names += (names.empty() ? "" : ", ") + *it;
        }
        fail(SSD_BAD_BUNDLE, path, " has other tensors than the bundle says (", names, "); ",
             build_again);
    }
}

// Kernels that Python's runner kept in the bundle. Those of other engines, or of another GPU,
// driver or version, are compiled anew; a library does not write into the bundles it is given.
void LoadedEngines::read_kernels() {
    std::string const name = files_.folder() + "/runtime.cache";
    if (kernels_ == nullptr || !files_.bundle().has(name)) {
        return;
    }
    std::string content;
    try {
        read_file(files_.bundle().file(name), max_kernel_bytes, content);
    } catch (Failure const&) {
        return;  // a cache that will not do is no reason to refuse
    }
    if (content.size() > digest_bytes &&
        hexadecimal(content.substr(0, digest_bytes)) == digest(files_.manifest())) {
        kernels_->read(content.data() + digest_bytes, content.size() - digest_bytes);
    }
}

}  // namespace ssd_runtime
