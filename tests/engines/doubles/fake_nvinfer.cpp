// TensorRT as a double that executes: engines are the ONNX graphs of the bundle $SSD_FAKE_BUNDLE,
// run by ONNX Runtime on the memory of the CUDA double; the content of an engine file is "the
// engine of GRAPH". Every run checks what TensorRT leaves to the caller: all addresses set and
// aligned, outputs that engine.json aliases at the address of their input, no other overlap, enough
// scratch memory (whose content is destroyed), weights as in their file. Every call and every
// destruction wants the device's context current in its thread.
//
// SSD_FAKE_VERSION (that of the headers); SSD_FAKE_SLOTS: a file for the positions that the caches
// hold when an image is decoded, int32, in the order of a decode step's inputs; SSD_FAKE_CACHES: a
// file for logits and caches as the last prefill and what followed it left them, in the same order.
// A twin of tests/tensorrt/trt_double.py.
#ifdef SSD_TENSORRT_RTX
#define nvinfer1 nvinfer1_rtx
#endif
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>
#include <nlohmann/json.hpp>

#include "fake_cuda.h"
#include "stubs.h"

#define PUBLIC extern "C" __attribute__((visibility("default")))

void unused(char const* call) { fake::die(std::string(call) + " is no call that was expected"); }

namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

#ifdef SSD_TENSORRT_RTX
constexpr bool is_rtx = true;
#else
constexpr bool is_rtx = false;
#endif

struct Type {
    char const* name;
    DataType trt;
    ONNXTensorElementDataType onnx;
    size_t size;
};
constexpr Type types[] = {{"float32", DataType::kFLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4},
                          {"float16", DataType::kHALF, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2},
                          {"bfloat16", DataType::kBF16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, 2},
                          {"int8", DataType::kINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1},
                          {"int32", DataType::kINT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},
                          {"int64", DataType::kINT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8}};

Type const& type_named(std::string const& name) {
    for (Type const& type : types) {
        if (name == type.name) {
            return type;
        }
    }
    fake::die("dtype " + name);
}

struct Tensor {
    std::string name;
    Type type;
    Json shape;
};

std::vector<Tensor> tensors_of(Json const& specs) {
    std::vector<Tensor> tensors;
    for (Json const& spec : specs) {
        tensors.push_back({spec["name"], type_named(spec["dtype"]), spec["shape"]});
    }
    return tensors;
}

bool begins(std::string const& name, char const* begin) { return name.rfind(begin, 0) == 0; }

std::string kind_of(std::string const& cache) { return cache.substr(cache.rfind('.') + 1); }

// The bundle and its engine.json.
class Content {
public:
    static Content& get() {
        static auto* const made = new Content(std::getenv("SSD_FAKE_BUNDLE"));
        return *made;
    }

    // Runs a graph of the bundle: memory by name, outputs written when all are made.
    void run(std::string const& graph, std::map<std::string, std::byte*> const& memory,
             std::map<std::string, std::vector<int64_t>> const& shapes,
             std::map<std::string, std::string> const& written_as = {}) {
        std::lock_guard<std::mutex> const lock(mutex_);
        Ort::Session& session = opened(graph);
        Ort::MemoryInfo const host =
            Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        std::vector<Ort::Value> given;
        std::vector<std::string> names;
        for (Tensor const& tensor : tensors_of(config["graphs"][graph]["inputs"])) {
            std::vector<int64_t> const& shape = shapes.at(tensor.name);
            size_t size = tensor.type.size;
            for (int64_t const dimension : shape) {
                size *= static_cast<size_t>(dimension);
            }
            given.push_back(Ort::Value::CreateTensor(host, memory.at(tensor.name), size,
                                                     shape.data(), shape.size(), tensor.type.onnx));
            names.push_back(tensor.name);
        }
        std::vector<Tensor> const outputs = tensors_of(config["graphs"][graph]["outputs"]);
        std::vector<char const*> in, out;
        for (std::string const& name : names) {
            in.push_back(name.c_str());
        }
        for (Tensor const& tensor : outputs) {
            out.push_back(tensor.name.c_str());
        }
        std::vector<Ort::Value> const made = session.Run(
            Ort::RunOptions{nullptr}, in.data(), given.data(), in.size(), out.data(), out.size());
        for (size_t i = 0; i < made.size(); ++i) {
            auto const other = written_as.find(outputs[i].name);
            std::byte* const target =
                memory.at(other == written_as.end() ? outputs[i].name : other->second);
            std::memcpy(
                target, made[i].GetTensorRawData(),
                made[i].GetTensorTypeAndShapeInfo().GetElementCount() * outputs[i].type.size);
        }
    }

    Json config, engines;
    std::string weights;  // the file that engines take as inputs

    // Whether an engine writes its caches by KV-cache-update layers.
    bool updates_caches(std::string const& graph) const {
        return begins(graph, "prefill")
                   ? !engines["graphs"][graph]["aliases"].empty()
                   : engines["form"] == "kv-update" && begins(graph, "decode_step");
    }

private:
    explicit Content(fs::path const& bundle) : bundle_(bundle), env_(ORT_LOGGING_LEVEL_FATAL) {
        std::ifstream(bundle / "ssd_config.json") >> config;
        for (auto const& entry : fs::directory_iterator(bundle / "engines")) {
            if (fs::exists(entry.path() / "engine.json")) {
                std::ifstream(entry.path() / "engine.json") >> engines;
            }
        }
        for (auto const& [graph, entry] : engines["graphs"].items()) {
            if (begins(graph, "prefill")) {
                take_caches(config["graphs"][graph], entry["aliases"]);
            }
        }
        std::ifstream file(bundle / engines["weights_file"].get<std::string>(), std::ios::binary);
        weights.assign(std::istreambuf_iterator<char>(file), {});
    }

    // The keys and values that a prefill overwrites are inputs, and outputs of their shape.
    void take_caches(Json& prefill, Json const& aliases) const {
        for (Json const& input : config["graphs"]["decode_step"]["inputs"]) {
            for (Json& output : prefill["outputs"]) {
                if (aliases.value(output["name"].get<std::string>(), "") == input["name"]) {
                    output["shape"] = input["shape"];
                    prefill["inputs"].push_back(input);
                }
            }
        }
    }

    Ort::Session& opened(std::string const& graph) {
        auto const found = sessions_.find(graph);
        if (found != sessions_.end()) {
            return *found->second;
        }
        bool const updates = updates_caches(graph);
        fs::path const path = bundle_ / "onnx" / (graph + (updates ? ".kv_update.onnx" : ".onnx"));
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(1);
        options.SetInterOpNumThreads(1);
        options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
        if (config["precision"]["weights"] != "none") {  // multiplied out, as TensorRT computes
            options.AddConfigEntry("session.disable_quant_qdq", "1");
        }
        return *sessions_
                    .emplace(graph, std::make_unique<Ort::Session>(env_, path.c_str(), options))
                    .first->second;
    }

    fs::path bundle_;
    Ort::Env env_;
    std::mutex mutex_;
    std::map<std::string, std::unique_ptr<Ort::Session>> sessions_;
};

// Something of TensorRT's that lives on the device until it is deleted.
class OnDevice {
public:
    explicit OnDevice(std::string what) : what_(std::move(what)) {
        fake::need_context(what_);
        fake::born(what_);
    }
    OnDevice(OnDevice const&) = delete;
    OnDevice& operator=(OnDevice const&) = delete;
    ~OnDevice() {
        if (stream_ != nullptr) {
            fake::gone(what_, stream_);
        } else {
            fake::gone(what_);
        }
    }
    void check(char const* call) const {
        fake::need_context(what_ + "." + call);
        fake::log(std::string(call) + " " + what_);
    }
    // From now on it works on this stream, which must outlive it.
    void use(void* stream) {
        if (stream_ == nullptr) {
            fake::gone(what_);
            fake::born(what_, stream);
            stream_ = stream;
        }
    }
    std::string const& what() const { return what_; }

private:
    std::string what_;
    void* stream_ = nullptr;
};

struct LoggerOfProcess {
    static ILogger*& get() {
        static ILogger* logger = nullptr;
        return logger;
    }
    static void error(char const* said) { get()->log(ILogger::Severity::kERROR, said); }
};

bool refused(char const* call) {
    if (fake::refuses(call)) {
        LoggerOfProcess::error(
            (std::string("[double.cpp::") + call + "::7] Error Code 6:\n" + call + " was refused")
                .c_str());
        return true;
    }
    return false;
}

#ifdef SSD_TENSORRT_RTX
// Names of the graphs whose kernels are compiled.
class CacheDouble : public IRuntimeCache, public VRuntimeCacheStub {
public:
    CacheDouble() : alive("runtime cache") { mImpl = this; }
    bool deserialize(void const* blob, size_t size) noexcept override {
        alive.check("deserialize");
        std::string const text(static_cast<char const*>(blob), size);
        bool const fits = begins(text, environment);
        for (size_t at = fits ? std::strlen(environment) : text.size(); at < text.size();) {
            size_t const end = std::min(text.find(',', at), text.size());
            kernels.insert(text.substr(at, end - at));
            at = end + 1;
        }
        return fits;
    }
    IHostMemory* serialize() const noexcept override { unused("serialize"); }

    OnDevice alive;
    std::set<std::string> kernels;
    static constexpr char environment[] = "one GPU, one driver:";
};

class ConfigDouble : public IRuntimeConfig, public VRuntimeConfigStub {
public:
    ConfigDouble() { mImpl = this; }
    ~ConfigDouble() noexcept override {}
    void setExecutionContextAllocationStrategy(
        ExecutionContextAllocationStrategy given) noexcept override {
        is_users = given == ExecutionContextAllocationStrategy::kUSER_MANAGED;
    }
    IRuntimeCache* createRuntimeCache() const noexcept override { return new CacheDouble; }
    bool setRuntimeCache(IRuntimeCache const& given) noexcept override {
        cache = const_cast<CacheDouble*>(static_cast<CacheDouble const*>(&given));
        return true;
    }
    bool setCudaGraphStrategy(CudaGraphStrategy given) noexcept override {
        is_plain = given == CudaGraphStrategy::kDISABLED;
        return true;
    }
    void setDynamicShapesKernelSpecializationStrategy(
        DynamicShapesKernelSpecializationStrategy given) noexcept override {
        is_eager = given == DynamicShapesKernelSpecializationStrategy::kEAGER;
    }

    bool is_users = false, is_plain = false, is_eager = false;
    CacheDouble* cache = nullptr;
};
#endif

class EngineDouble;

// Whether no step has run since the last prefill.
bool& is_prefilled() {
    static bool made = false;
    return made;
}

// Writes the positions of the caches that the last decode step had.
std::function<void()>& positions() {
    static std::function<void()> made;
    return made;
}

class ContextDouble : public IExecutionContext, public VExecutionContextStub {
public:
    explicit ContextDouble(EngineDouble& engine);
    ~ContextDouble() noexcept override = default;

    bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept override;
    bool setInputShape(char const* name, Dims const& dims) noexcept override;
    size_t updateDeviceMemorySizeForShapes() noexcept override;
    void setDeviceMemoryV2(void* memory, int64_t size) noexcept override;
    bool setTensorAddress(char const* name, void* data) noexcept override;
    bool enqueueV3(cudaStream_t stream) noexcept override;
#ifdef SSD_TENSORRT_RTX
    bool isStreamCapturable(cudaStream_t) const noexcept override {
        alive_.check("isStreamCapturable");
        return ran_with_ == shapes_;
    }
#endif

private:
    using Shapes = std::map<std::string, std::vector<int64_t>>;

    std::vector<int64_t> shape_of(Tensor const& tensor, bool of_graph) const;
    void check_shapes() const;
    size_t needed_scratch() const;
    std::map<std::string, std::byte*> views() const;
    void check_overlaps(std::map<std::string, std::byte*> const& views) const;
    void run(std::map<std::string, std::byte*> const& views, Shapes const& shapes) const;
    static void evict(std::map<std::string, std::byte*> const& views, Shapes const& shapes);
    static void evict_images(std::map<std::string, std::byte*> const& views, Shapes shapes);
    void write_positions(std::map<std::string, std::byte*> const& views) const;
    void write_caches(std::map<std::string, std::byte*> const& views) const;
    size_t size_of(Tensor const& tensor) const;

    EngineDouble& engine_;
    OnDevice alive_;
    int32_t profile_ = -1;
    std::map<std::string, int64_t> sizes_;
    Shapes shapes_, ran_with_;
    std::map<std::string, uint64_t> addresses_;
    uint64_t scratch_ = 0;
    size_t scratch_bytes_ = 0;
};

class EngineDouble : public ICudaEngine, public VCudaEngineStub {
public:
    explicit EngineDouble(std::string name) : graph(std::move(name)), alive("engine of " + graph) {
        mImpl = this;
        Content& content = Content::get();
        spec = content.config["graphs"][graph];
        entry = content.engines["graphs"][graph];
        bool const updates = content.updates_caches(graph);
        for (auto const* side : {"inputs", "outputs"}) {
            for (Tensor tensor : tensors_of(spec[side])) {
                std::string const kind = kind_of(tensor.name);
                if (updates && tensor.shape.size() == 4 && (kind == "key" || kind == "value")) {
                    tensor.shape = {"rows_x" + tensor.shape[1].dump(), 1, tensor.shape[2],
                                    tensor.shape[3]};
                }
                tensors.push_back(tensor);
            }
        }
        for (auto const& [weight, stored] : entry["weights"].items()) {
            tensors.push_back({weight, type_named(stored["dtype"]), stored["shape"]});
        }
    }
    ~EngineDouble() noexcept override = default;

    int32_t getNbIOTensors() const noexcept override {
        return static_cast<int32_t>(tensors.size());
    }
    char const* getIOTensorName(int32_t index) const noexcept override {
        return tensors[static_cast<size_t>(index)].name.c_str();
    }
    DataType getTensorDataType(char const* name) const noexcept override {
        return named(name)->type.trt;
    }
    TensorLocation getTensorLocation(char const*) const noexcept override {
        return TensorLocation::kDEVICE;
    }
    int64_t getDeviceMemorySizeV2() const noexcept override { return 1 << 20; }
#ifdef SSD_TENSORRT_RTX
    IRuntimeConfig* createRuntimeConfig() noexcept override {
        alive.check("createRuntimeConfig");
        return new ConfigDouble;
    }
    IExecutionContext* createExecutionContextWithRuntimeConfig(
        IRuntimeConfig* given) noexcept override {
        alive.check("createExecutionContext");
        auto* const config = static_cast<ConfigDouble*>(given);
        if (!config->is_users || !config->is_eager || !config->is_plain) {
            fake::die("a context that allocates, compiles later or captures by itself");
        }
        if (config->cache == nullptr) {
            fake::die("kernels are compiled at every start");
        }
        if (config->cache->kernels.insert(graph).second) {
            fake::log("compiled " + graph);
        }
        return refused("createExecutionContext") ? nullptr : new ContextDouble(*this);
    }
#else
    IExecutionContext* createExecutionContext(
        ExecutionContextAllocationStrategy strategy) noexcept override {
        alive.check("createExecutionContext");
        if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) {
            fake::die("a context that allocates");
        }
        return refused("createExecutionContext") ? nullptr : new ContextDouble(*this);
    }
#endif

    Tensor const* named(std::string const& name) const {
        for (Tensor const& tensor : tensors) {
            if (tensor.name == name) {
                return &tensor;
            }
        }
        return nullptr;
    }

    std::string graph;
    OnDevice alive;
    Json spec, entry;
    std::vector<Tensor> tensors;  // in the engine's shapes, weights last
};

ContextDouble::ContextDouble(EngineDouble& engine)
    : engine_(engine), alive_("context of " + engine.graph) {
    mImpl = this;
}

bool ContextDouble::setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept {
    alive_.check("setOptimizationProfileAsync");
    alive_.use(stream);
    profile_ = profile;
    return !refused("setOptimizationProfileAsync") &&
           profile < static_cast<int32_t>(engine_.entry["profiles"].size());
}

bool ContextDouble::setInputShape(char const* name, Dims const& dims) noexcept {
    alive_.check("setInputShape");
    if (refused("setInputShape")) {
        return false;
    }
    Tensor const* const tensor = engine_.named(name);
    if (tensor == nullptr || tensor->shape.size() != static_cast<size_t>(dims.nbDims)) {
        return false;
    }
    Json const& profile = engine_.entry["profiles"][static_cast<size_t>(profile_)];
    int64_t const rows = Content::get().config["model"]["rows_per_image"];
    std::vector<int64_t> shape(dims.d, dims.d + dims.nbDims);
    for (size_t i = 0; i < shape.size(); ++i) {
        Json const& wanted = tensor->shape[i];
        int64_t least = 0, most = 0;
        if (wanted.is_number()) {
            least = most = wanted;
        } else if (wanted == "window") {
            least = most = sizes_["window"] = profile["window"];
        } else {
            std::string const dimension = wanted;
            Json const& bounds = profile[dimension == "prompt_tokens" ? "prompt_tokens" : "images"];
            int64_t const each = begins(dimension, "rows_x")
                                     ? rows * std::stoll(dimension.substr(6))
                                 : dimension == "rows" ? rows
                                                       : 1;
            least = each * bounds[0].get<int64_t>();
            most = each * bounds[2].get<int64_t>();
            sizes_[dimension] = shape[i];
            if (begins(dimension, "rows_x")) {
                sizes_["rows"] = shape[i] / std::stoll(dimension.substr(6));
            }
        }
        if (shape[i] < least || shape[i] > most) {
            LoggerOfProcess::error("a shape outside of the profile");
            return false;
        }
    }
    shapes_[name] = shape;
    return true;
}

// Of the engine or, with kv-update, of the bundle's graph that stands for it.
std::vector<int64_t> ContextDouble::shape_of(Tensor const& tensor, bool) const {
    std::vector<int64_t> shape;
    for (Json const& dimension : tensor.shape) {
        shape.push_back(dimension.is_number() ? dimension.get<int64_t>()
                                              : sizes_.at(dimension.get<std::string>()));
    }
    return shape;
}

void ContextDouble::check_shapes() const {
    for (Json const& input : engine_.spec["inputs"]) {
        bool const has_names = std::any_of(input["shape"].begin(), input["shape"].end(),
                                           [](Json const& size) { return size.is_string(); });
        if (has_names && shapes_.count(input["name"]) == 0) {
            fake::die(input["name"].get<std::string>() + " has no shape");
        }
    }
}

// Odd on purpose; none for the evict graph, where the real call's 0 can also mean an error.
size_t ContextDouble::needed_scratch() const {
    int64_t most = 1;
    for (auto const& [name, shape] : shapes_) {
        most = std::max(most, shape.at(0));
    }
    return static_cast<size_t>(1003 * most);
}

size_t ContextDouble::updateDeviceMemorySizeForShapes() noexcept {
    alive_.check("updateDeviceMemorySizeForShapes");
    check_shapes();
    return engine_.graph == "evict" ? 0 : needed_scratch();
}

void ContextDouble::setDeviceMemoryV2(void* memory, int64_t size) noexcept {
    alive_.check("setDeviceMemory");
    scratch_ = reinterpret_cast<uint64_t>(memory);
    scratch_bytes_ = static_cast<size_t>(size);
    size_t const needed = engine_.graph == "evict" ? 1U << 20U : needed_scratch();
    if (scratch_ % 256 != 0 || scratch_bytes_ < needed) {
        fake::die("scratch memory that is too small, or not aligned");
    }
}

bool ContextDouble::setTensorAddress(char const* name, void* data) noexcept {
    fake::need_context("setTensorAddress");
    fake::log(std::string("setTensorAddress ") + engine_.graph + " " + name);
    auto const address = reinterpret_cast<uint64_t>(data);
    addresses_[name] = address;
    return !refused("setTensorAddress") && engine_.named(name) != nullptr && address % 256 == 0;
}

bool ContextDouble::enqueueV3(cudaStream_t stream) noexcept {
    alive_.check("enqueueV3");
    check_shapes();
    if (refused("enqueueV3")) {
        return false;
    }
    if (fake::is_capturing(stream) && ran_with_ != shapes_) {
        fake::die("captured before a first run at these shapes");
    }
    ran_with_ = shapes_;
    auto const memory = views();
    Shapes shapes;
    for (Tensor const& tensor : engine_.tensors) {
        shapes[tensor.name] = shape_of(tensor, true);
    }
    fake::queue(stream, [this, memory, shapes] { run(memory, shapes); });
    return true;
}

// The memory of every tensor, as it is bound now, with all checks.
std::map<std::string, std::byte*> ContextDouble::views() const {
    std::map<std::string, std::byte*> views;
    for (Tensor const& tensor : engine_.tensors) {
        auto const address = addresses_.find(tensor.name);
        if (address == addresses_.end()) {
            fake::die(tensor.name + " has no address");
        }
        size_t const size = size_of(tensor);
        views[tensor.name] = fake::memory(address->second, size);
    }
    for (auto const& [output, input] : engine_.entry["aliases"].items()) {
        if (addresses_.at(output) != addresses_.at(input.get<std::string>())) {
            fake::die(output + " is not in place");
        }
    }
    check_overlaps(views);
    return views;
}

void ContextDouble::check_overlaps(std::map<std::string, std::byte*> const& views) const {
    std::map<uint64_t, std::pair<uint64_t, std::string>> spans;  // start -> end, name
    spans[scratch_] = {scratch_ + scratch_bytes_, "scratch memory"};
    for (Tensor const& tensor : engine_.tensors) {
        if (engine_.entry["aliases"].contains(tensor.name)) {
            continue;
        }
        size_t const size = size_of(tensor);
        auto const start = reinterpret_cast<uint64_t>(views.at(tensor.name));
        if (!spans.emplace(start, std::pair(start + size, tensor.name)).second) {
            fake::die(tensor.name + " lies where " + spans[start].second + " does");
        }
    }
    uint64_t end = 0;
    for (auto const& [start, span] : spans) {
        if (start < end) {
            fake::die(span.second + " overlaps another tensor in " + engine_.graph);
        }
        end = span.first;
    }
}

void ContextDouble::run(std::map<std::string, std::byte*> const& views,
                        Shapes const& shapes) const {
    Content& content = Content::get();
    std::string const& graph = engine_.graph;
    fake::log("run " + graph);
    if (begins(graph, "prefill")) {
        fake::log("rows of prefill " + std::to_string(shapes.at("inputs_embeds")[0]));
        is_prefilled() = true;
    } else if (begins(graph, "decode_step") && is_prefilled()) {
        is_prefilled() = false;
        write_caches(views);
    }
    for (auto const& [name, weight] : engine_.entry["weights"].items()) {
        if (std::memcmp(views.at(name), content.weights.data() + weight["offset"].get<size_t>(),
                        weight["num_bytes"].get<size_t>()) != 0) {
            fake::die(name + " is not as stored");
        }
    }
    std::memset(fake::memory(scratch_, scratch_bytes_), 0xCD, scratch_bytes_);
    if (begins(graph, "decode_step")) {
        positions() = [this, views] { write_positions(views); };
    } else if (graph == "image_decoder" && positions()) {
        positions()();
    }
    if (!content.engines["plugin"].is_null() && content.config["graphs"].contains("evict")) {
        if (begins(graph, "decode_step")) {
            evict(views, shapes);
        } else if (begins(graph, "decode_window")) {
            evict_images(views, shapes);
        }
    }
    content.run(graph, views, shapes);
    std::memset(fake::memory(scratch_, scratch_bytes_), 0xCD, scratch_bytes_);
}

// What the plugin does before it writes: heads without an empty slot evict (R7).
void ContextDouble::evict(std::map<std::string, std::byte*> const& views, Shapes const& shapes) {
    Content& content = Content::get();
    std::map<std::string, std::string> in_place;
    for (Json const& output : content.config["graphs"]["evict"]["outputs"]) {
        std::string const name = output["name"];
        in_place[name] = "past_key_values" + name.substr(std::strlen("present"));
    }
    content.run("evict", views, shapes, in_place);
}

// The same in the rows of images that do not rest, each before its own step.
void ContextDouble::evict_images(std::map<std::string, std::byte*> const& views, Shapes shapes) {
    auto const images = static_cast<size_t>(shapes.at("first")[0]);
    auto const* const first = reinterpret_cast<int64_t const*>(views.at("first"));
    auto const* const limit = reinterpret_cast<int64_t const*>(views.at("limit"));
    shapes["step"] = {1};
    for (size_t image = 0; image < images; ++image) {
        if (limit[image] == 0) {
            continue;
        }
        int64_t step = first[image];
        std::map<std::string, std::byte*> own = views;
        own["step"] = reinterpret_cast<std::byte*>(&step);
        std::map<std::string, std::vector<std::byte>> caches;  // of all rows, those of one kept
        for (auto const& [name, shape] : shapes) {
            if (begins(name, "past_key_values.") &&
                (kind_of(name) == "position" || kind_of(name) == "score")) {
                size_t const size = 4 * static_cast<size_t>(shape[0] * shape[1] * shape[2]);
                caches[name].assign(views.at(name), views.at(name) + size);
                own[name] = caches[name].data();
            }
        }
        evict(own, shapes);
        for (auto const& [name, cache] : caches) {
            size_t const rows = static_cast<size_t>(shapes.at(name)[0]), size = cache.size() / rows;
            for (size_t row = image; row < rows; row += images) {
                std::memcpy(views.at(name) + row * size, cache.data() + row * size, size);
            }
        }
    }
}

// To $SSD_FAKE_SLOTS.
void ContextDouble::write_positions(std::map<std::string, std::byte*> const& views) const {
    char const* const path = std::getenv("SSD_FAKE_SLOTS");
    if (path == nullptr) {
        return;
    }
    std::ofstream file(path, std::ios::binary);
    for (Tensor const& tensor : engine_.tensors) {
        if (begins(tensor.name, "past_key_values.") && kind_of(tensor.name) == "position") {
            file.write(reinterpret_cast<char const*>(views.at(tensor.name)),
                       static_cast<std::streamsize>(size_of(tensor)));
        }
    }
}

// To $SSD_FAKE_CACHES.
void ContextDouble::write_caches(std::map<std::string, std::byte*> const& views) const {
    char const* const path = std::getenv("SSD_FAKE_CACHES");
    if (path == nullptr) {
        return;
    }
    std::ofstream file(path, std::ios::binary);
    for (Tensor const& tensor : engine_.tensors) {
        if (tensor.name == "logits" || begins(tensor.name, "past_key_values.")) {
            file.write(reinterpret_cast<char const*>(views.at(tensor.name)),
                       static_cast<std::streamsize>(size_of(tensor)));
        }
    }
}

size_t ContextDouble::size_of(Tensor const& tensor) const {
    size_t size = tensor.type.size;
    for (int64_t const dimension : shape_of(tensor, false)) {
        size *= static_cast<size_t>(dimension);
    }
    return size;
}

class RuntimeDouble : public IRuntime, public VRuntimeStub {
public:
    RuntimeDouble() : alive_("runtime") { mImpl = this; }
    ~RuntimeDouble() noexcept override = default;

    void setEngineHostCodeAllowed(bool allowed) noexcept override { host_code_ = allowed; }
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
        alive_.check("deserializeCudaEngine");
        std::string const text(static_cast<char const*>(blob), size);
        std::string const begin = "the engine of ";
        std::string const graph = text.substr(std::min(text.size(), begin.size()));
        Json const& plugin = Content::get().engines["plugin"];
        bool const needs_code = !plugin.is_null() && plugin["in_engine"];
        if (!Content::get().engines["graphs"].contains(graph) || (needs_code && !host_code_)) {
            LoggerOfProcess::error(
                "IRuntime::deserializeCudaEngine: Error Code 6:\nno such engine");
            return nullptr;
        }
        return refused("deserializeCudaEngine") ? nullptr : new EngineDouble(graph);
    }

private:
    OnDevice alive_;
    bool host_code_ = false;
};

class Creator : public IPluginCreatorV3One {
public:
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const*,
                            TensorRTPhase) noexcept override {
        unused("createPlugin");
    }
    PluginFieldCollection const* getFieldNames() noexcept override { unused("getFieldNames"); }
    AsciiChar const* getPluginName() const noexcept override { return "DecodeAttention"; }
    AsciiChar const* getPluginVersion() const noexcept override { return "2"; }
    AsciiChar const* getPluginNamespace() const noexcept override { return "ssd_export"; }
};

class Registry : public IPluginRegistryStub {
public:
    PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override {
        fake::log(std::string("loadLibrary ") + fs::path(path).filename().string());
        if (!refused("loadLibrary")) {
            creators_.push_back(&creator_);
        }
        return creators_.empty() ? nullptr : this;
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t* const count) const noexcept override {
        *count = static_cast<int32_t>(creators_.size());
        return creators_.data();
    }

private:
    Creator creator_;
    std::vector<IPluginCreatorInterface*> creators_;
};

int32_t version_part(size_t part) {
    int32_t numbers[] = {NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH,
                         NV_TENSORRT_BUILD};
    if (char const* const text = std::getenv("SSD_FAKE_VERSION")) {
        std::sscanf(text, "%d.%d.%d.%d", &numbers[0], &numbers[1], &numbers[2], &numbers[3]);
    }
    return numbers[part];
}

}  // namespace

PUBLIC void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
    if (version != NV_TENSORRT_VERSION) {
        fake::die("another version of the headers");
    }
    LoggerOfProcess::get() = static_cast<ILogger*>(logger);
    return refused("createInferRuntime") ? nullptr : static_cast<IRuntime*>(new RuntimeDouble);
}
PUBLIC nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
    static auto* const registry = new Registry;
    return registry;
}
PUBLIC int32_t getInferLibMajorVersion() noexcept { return version_part(0); }
PUBLIC int32_t getInferLibMinorVersion() noexcept { return version_part(1); }
PUBLIC int32_t getInferLibPatchVersion() noexcept { return version_part(2); }
PUBLIC int32_t getInferLibBuildVersion() noexcept { return version_part(3); }
