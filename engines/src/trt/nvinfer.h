#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "config.h"
#include "trt/cuda_device.h"

// TensorRT and TensorRT-RTX as the runner sees them. nvinfer.cpp, which alone includes their
// headers, is compiled once against each; their libraries are opened when they are first needed.
// Calls that TensorRT refuses return false or null, and Nvinfer::reason() is what it said.

namespace ssd_runtime {

struct EngineTensor {
    std::string name;
    std::optional<Dtype> dtype;  // none: one that no bundle has
    bool is_on_device;
};

// The kernels that TensorRT-RTX compiles for the GPU it runs on.
class KernelCache {
public:
    virtual ~KernelCache() = default;
    // False for one of another GPU, driver or version.
    virtual bool read(void const* data, size_t size) = 0;
    virtual std::string content() const = 0;
};

class ExecutionContext {
public:
    virtual ~ExecutionContext() = default;
    virtual bool set_profile(int32_t profile, CudaStream stream) = 0;
    virtual bool set_input_shape(std::string const& name, std::vector<int64_t> const& shape) = 0;
    // Of the intermediate results at the sizes set; 0 where TensorRT does not say.
    virtual size_t scratch_bytes() = 0;
    virtual void use_scratch(DeviceAddress address, size_t num_bytes) = 0;
    virtual bool bind(std::string const& name, DeviceAddress address) = 0;
    virtual bool enqueue(CudaStream stream) = 0;
    // TensorRT has no such question and says true.
    virtual bool is_capturable(CudaStream stream) = 0;
};

class Engine {
public:
    virtual ~Engine() = default;
    virtual std::vector<EngineTensor> tensors() const = 0;
    // Of the intermediate results at the greatest sizes of all profiles.
    virtual size_t scratch_bytes() const = 0;
    // Without memory. kernels: made when the first context asks; TensorRT has none.
    virtual std::unique_ptr<ExecutionContext> new_context(KernelCache* kernels) = 0;
    // Null: this TensorRT compiles nothing here.
    virtual std::unique_ptr<KernelCache> new_kernel_cache() = 0;
};

class EngineRuntime {
public:
    virtual ~EngineRuntime() = default;
    virtual std::unique_ptr<Engine> deserialize(void const* data, size_t size) = 0;
};

class Nvinfer {
public:
    virtual ~Nvinfer() = default;
    virtual std::string const& flavor() const = 0;   // tensorrt or tensorrt-rtx
    virtual std::string const& version() const = 0;  // major.minor.patch.build of the library
    // host_code_allowed: engine files carry the plugin's library.
    virtual std::unique_ptr<EngineRuntime> new_runtime(bool host_code_allowed) const = 0;
    // Registers the plugins of a library, once a process.
    virtual bool load_plugin(std::string const& library) const = 0;
    // TensorRT's last error on one line.
    virtual std::string reason() const = 0;
    virtual void forget_reason() const = 0;
};

// The library of this process. Throws Failure SSD_UNAVAILABLE where it is missing or too old.
Nvinfer const& open_tensorrt();
Nvinfer const& open_tensorrt_rtx();

}  // namespace ssd_runtime
