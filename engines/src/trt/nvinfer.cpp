// Compiled once against the headers of TensorRT and, with SSD_TENSORRT_RTX, once against those of
// TensorRT-RTX. Both call everything nvinfer1, and their classes differ: one of the two gets
// another name here. Only virtual calls and functions with C names cross over, so no name matters.
#ifdef SSD_TENSORRT_RTX
#define nvinfer1 nvinfer1_rtx
#endif
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <regex>

#include <dlfcn.h>

#include "failure.h"
#include "trt/nvinfer.h"

#define SSD_TEXT_OF(number) #number
#define SSD_TEXT(number) SSD_TEXT_OF(number)

namespace ssd_runtime {
namespace {

using namespace nvinfer1;

#ifdef SSD_TENSORRT_RTX
char const flavor_name[] = "tensorrt-rtx";
char const library_name[] = "libtensorrt_rtx.so." SSD_TEXT(NV_TENSORRT_MAJOR);
char const how_to_install[] =
    "put the SDK of TensorRT-RTX on the loader's path (LD_LIBRARY_PATH, or ldconfig)";
#else
char const flavor_name[] = "tensorrt";
char const library_name[] = "libnvinfer.so." SSD_TEXT(NV_TENSORRT_MAJOR);
char const how_to_install[] =
    "sudo apt install libnvinfer" SSD_TEXT(NV_TENSORRT_MAJOR) " (JetPack brings it)";
#endif
char const plugin_name[] = "DecodeAttention";
constexpr size_t most_shown = 300;  // characters of a message

// Without line breaks and without the place in TensorRT's own sources in front.
std::string one_line(std::string const& said) {
    static std::regex const place(R"(^\s*(\S+\.(cpp|h|hpp):\d+:?|\[\S+\.cpp::\S+\])\s*)");
    static std::regex const blanks(R"(\s+)");
    std::string const line = std::regex_replace(
        std::regex_replace(said, place, "", std::regex_constants::format_first_only), blanks, " ");
    return line.size() <= most_shown ? line : line.substr(0, most_shown) + " …";
}

// One for the process: TensorRT-RTX keeps the first that it is given.
class Messages : public ILogger {
public:
    void log(Severity severity, char const* said) noexcept override {
        if (severity == Severity::kERROR || severity == Severity::kINTERNAL_ERROR) {
            try {
                std::lock_guard<std::mutex> const lock(mutex_);
                last_ = said;
            } catch (std::bad_alloc const&) {
                return;  // of a message that does not fit, the call's own failure is left
            }
        }
    }
    std::string last() const {
        std::lock_guard<std::mutex> const lock(mutex_);
        return last_.empty() ? "it gave no reason" : one_line(last_);
    }
    void forget() {
        std::lock_guard<std::mutex> const lock(mutex_);
        last_.clear();
    }

private:
    mutable std::mutex mutex_;
    std::string last_;
};

Messages& messages() {
    static auto* const made = new Messages;  // outlives whatever TensorRT destroys at exit
    return *made;
}

std::optional<Dtype> dtype_of(DataType type) {
    switch (type) {
    case DataType::kFLOAT: return Dtype::float32;
    case DataType::kHALF: return Dtype::float16;
    case DataType::kBF16: return Dtype::bfloat16;
    case DataType::kINT8: return Dtype::int8;
    case DataType::kINT32: return Dtype::int32;
    case DataType::kINT64: return Dtype::int64;
    default: return std::nullopt;
    }
}

cudaStream_t of(CudaStream stream) { return static_cast<cudaStream_t>(stream); }

#ifdef SSD_TENSORRT_RTX
class Kernels : public KernelCache {
public:
    explicit Kernels(IRuntimeCache* cache) : cache_(cache) {}

    bool read(void const* data, size_t size) override { return cache_->deserialize(data, size); }
    std::string content() const override {
        std::unique_ptr<IHostMemory> const made(cache_->serialize());
        return made ? std::string(static_cast<char const*>(made->data()), made->size()) : "";
    }
    IRuntimeCache& get() { return *cache_; }

private:
    std::unique_ptr<IRuntimeCache> cache_;
};
#endif

class Context : public ExecutionContext {
public:
    explicit Context(IExecutionContext* context) : context_(context) {}

    bool set_profile(int32_t profile, CudaStream stream) override {
        return context_->setOptimizationProfileAsync(profile, of(stream));
    }
    bool set_input_shape(std::string const& name, std::vector<int64_t> const& shape) override {
        Dims dims{};
        if (shape.size() > static_cast<size_t>(Dims::MAX_DIMS)) {
            return false;
        }
        dims.nbDims = static_cast<int32_t>(shape.size());
        std::copy(shape.begin(), shape.end(), dims.d);
        return context_->setInputShape(name.c_str(), dims);
    }
    size_t scratch_bytes() override { return context_->updateDeviceMemorySizeForShapes(); }
    void use_scratch(DeviceAddress address, size_t num_bytes) override {
        context_->setDeviceMemoryV2(reinterpret_cast<void*>(address),
                                    static_cast<int64_t>(num_bytes));
    }
    bool bind(std::string const& name, DeviceAddress address) override {
        return context_->setTensorAddress(name.c_str(), reinterpret_cast<void*>(address));
    }
    bool enqueue(CudaStream stream) override { return context_->enqueueV3(of(stream)); }
    bool is_capturable([[maybe_unused]] CudaStream stream) override {
#ifdef SSD_TENSORRT_RTX
        return context_->isStreamCapturable(of(stream));
#else
        return true;
#endif
    }

private:
    std::unique_ptr<IExecutionContext> context_;
};

class LoadedEngine : public Engine {
public:
    explicit LoadedEngine(ICudaEngine* engine) : engine_(engine) {}

    std::vector<EngineTensor> tensors() const override {
        std::vector<EngineTensor> tensors;
        for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            char const* const name = engine_->getIOTensorName(i);
            tensors.push_back({name, dtype_of(engine_->getTensorDataType(name)),
                               engine_->getTensorLocation(name) == TensorLocation::kDEVICE});
        }
        return tensors;
    }
    size_t scratch_bytes() const override {
        return static_cast<size_t>(std::max<int64_t>(engine_->getDeviceMemorySizeV2(), 0));
    }

#ifdef SSD_TENSORRT_RTX
    std::unique_ptr<ExecutionContext> new_context(KernelCache* kernels) override {
        std::unique_ptr<IRuntimeConfig> const config(engine_->createRuntimeConfig());
        if (!config) {
            return nullptr;
        }
        config->setExecutionContextAllocationStrategy(
            ExecutionContextAllocationStrategy::kUSER_MANAGED);
        config->setDynamicShapesKernelSpecializationStrategy(  // all kernels before a capture
            DynamicShapesKernelSpecializationStrategy::kEAGER);
        bool const own = config->setCudaGraphStrategy(CudaGraphStrategy::kDISABLED);
        if (!own || (kernels != nullptr &&
                     !config->setRuntimeCache(static_cast<Kernels*>(kernels)->get()))) {
            return nullptr;
        }
        return made(engine_->createExecutionContext(config.get()));
    }
    std::unique_ptr<KernelCache> new_kernel_cache() override {
        std::unique_ptr<IRuntimeConfig> const config(engine_->createRuntimeConfig());
        IRuntimeCache* const cache = config ? config->createRuntimeCache() : nullptr;
        return cache == nullptr ? nullptr : std::make_unique<Kernels>(cache);
    }
#else
    std::unique_ptr<ExecutionContext> new_context(KernelCache*) override {
        return made(
            engine_->createExecutionContext(ExecutionContextAllocationStrategy::kUSER_MANAGED));
    }
    std::unique_ptr<KernelCache> new_kernel_cache() override { return nullptr; }
#endif

private:
    static std::unique_ptr<ExecutionContext> made(IExecutionContext* context) {
        return context == nullptr ? nullptr : std::make_unique<Context>(context);
    }

    std::unique_ptr<ICudaEngine> engine_;
};

class LoadedRuntime : public EngineRuntime {
public:
    explicit LoadedRuntime(IRuntime* runtime) : runtime_(runtime) {}

    std::unique_ptr<Engine> deserialize(void const* data, size_t size) override {
        ICudaEngine* const engine = runtime_->deserializeCudaEngine(data, size);
        return engine == nullptr ? nullptr : std::make_unique<LoadedEngine>(engine);
    }

private:
    std::unique_ptr<IRuntime> runtime_;
};

class Library : public Nvinfer {
public:
    Library() : library_(dlopen(library_name, RTLD_NOW | RTLD_LOCAL)) {
        if (library_ == nullptr) {
            fail(SSD_UNAVAILABLE, "the backend ", flavor_, " needs ", library_name,
                 ", which does not load (", dlerror(), "); ", how_to_install,
                 ", or use the backend onnxruntime");
        }
        create_runtime_ = find<decltype(create_runtime_)>("createInferRuntime_INTERNAL");
        registry_ = find<decltype(registry_)>("getPluginRegistry");
        int32_t numbers[4];
        char const* const names[] = {"Major", "Minor", "Patch", "Build"};
        for (size_t i = 0; i < 4; ++i) {
            std::string const name = text("getInferLib", names[i], "Version");
            numbers[i] = find<int32_t (*)()>(name.c_str())();
            version_ += (i == 0 ? "" : ".") + std::to_string(numbers[i]);
        }
        if (numbers[0] != NV_TENSORRT_MAJOR || numbers[1] < NV_TENSORRT_MINOR) {
            fail(
                SSD_UNAVAILABLE, flavor_, " ", version_,
                " was loaded and this ssd_runtime was built for " SSD_TEXT(NV_TENSORRT_MAJOR) ".",
                NV_TENSORRT_MINOR, " or a newer " SSD_TEXT(NV_TENSORRT_MAJOR) ".x; ",
                "install one, or build ssd_runtime again with the headers of the one that is here");
        }
    }

    std::string const& flavor() const override { return flavor_; }
    std::string const& version() const override { return version_; }
    std::string reason() const override { return messages().last(); }
    void forget_reason() const override { messages().forget(); }

    std::unique_ptr<EngineRuntime> new_runtime(bool host_code_allowed) const override {
        auto* const runtime =
            static_cast<IRuntime*>(create_runtime_(&messages(), NV_TENSORRT_VERSION));
        if (runtime == nullptr) {
            return nullptr;
        }
        runtime->setEngineHostCodeAllowed(host_code_allowed);
        return std::make_unique<LoadedRuntime>(runtime);
    }

    bool load_plugin(std::string const& library) const override {
        static std::mutex mutex;
        std::lock_guard<std::mutex> const lock(mutex);
        if (!has_plugin()) {
            registry_()->loadLibrary(library.c_str());
        }
        return has_plugin();
    }

private:
    template <typename Function>
    Function find(char const* name) const {
        auto const found = reinterpret_cast<Function>(dlsym(library_, name));
        if (found == nullptr) {
            fail(SSD_UNAVAILABLE, library_name, " has no ", name, "; ", how_to_install);
        }
        return found;
    }

    bool has_plugin() const {
        int32_t count = 0;
        IPluginCreatorInterface* const* const creators = registry_()->getAllCreators(&count);
        return std::any_of(creators, creators + count, [](IPluginCreatorInterface* creator) {
            return std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0 &&
                   std::strcmp(static_cast<IPluginCreatorV3One*>(creator)->getPluginName(),
                               plugin_name) == 0;
        });
    }

    void* library_;  // never closed: engines and plugins of other parts of the process may use it
    std::string const flavor_ = flavor_name;
    std::string version_;
    void* (*create_runtime_)(void*, int32_t) = nullptr;
    IPluginRegistry* (*registry_)() = nullptr;
};

}  // namespace

#ifdef SSD_TENSORRT_RTX
Nvinfer const& open_tensorrt_rtx() {
#else
Nvinfer const& open_tensorrt() {
#endif
    static Library const library;
    return library;
}

}  // namespace ssd_runtime
