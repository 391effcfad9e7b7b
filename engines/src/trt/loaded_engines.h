#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "trt/buffer_plan.h"
#include "trt/engine_files.h"
#include "trt/nvinfer.h"

namespace ssd_runtime {

// An engine at the sizes of one profile. Call order: set_sizes, scratch_bytes, use_scratch and
// bind, then enqueue. Throws Failure for what TensorRT refuses. The caller owns all memory that
// depends on the batch.
class GraphContext {
public:
    GraphContext(Nvinfer const& nvinfer, EngineFiles const& files, GraphSpec const& spec,
                 Engine const& engine, std::unique_ptr<ExecutionContext> context, int32_t profile,
                 CudaStream stream);

    std::string const& name() const { return name_; }  // an engine may have several contexts
    GraphSpec const& spec() const { return spec_; }
    Aliases const& aliases() const { return files_.entry(spec_.name).aliases; }

    // Numbers for the inputs' named dimensions.
    void set_sizes(Sizes const& sizes);
    // Device memory for intermediate results at the sizes set.
    uint64_t scratch_bytes();
    void use_scratch(DeviceAddress address, uint64_t num_bytes);
    void bind(std::string const& tensor, DeviceAddress address);
    // Queues one run; waits for nothing.
    void enqueue();
    // Whether a run can be part of a CUDA graph, as far as TensorRT knows.
    bool is_capturable() { return context_->is_capturable(stream_); }

private:
    void must(bool answer, std::string const& what) const;

    Nvinfer const& nvinfer_;
    EngineFiles const& files_;
    GraphSpec const& spec_;
    Engine const& engine_;
    std::unique_ptr<ExecutionContext> context_;
    std::string name_;
    CudaStream stream_;
};

// The engines of a bundle on a device, each loaded when first asked for; the weights they share are
// there once. Serves any number of threads.
class LoadedEngines {
public:
    // Throws Failure where weights and engines will not fit, before anything is loaded.
    LoadedEngines(Bundle const& bundle, Nvinfer const& nvinfer, int device);
    LoadedEngines(LoadedEngines const&) = delete;
    LoadedEngines& operator=(LoadedEngines const&) = delete;
    ~LoadedEngines();

    CudaDevice const& device() const { return device_; }
    EngineFiles const& files() const { return files_; }
    Config const& config() const { return files_.bundle().config(); }
    // Of a graph's engine.
    GraphSpec const& contract(std::string const& graph) const { return contracts_.at(graph); }
    uint64_t weight_bytes() const { return weight_bytes_; }

    // A context of a graph's engine for so many images, weights bound.
    std::unique_ptr<GraphContext> new_context(std::string const& graph, int64_t num_images,
                                              CudaStream stream);

private:
    Engine& engine(std::string const& graph);
    void check_tensors(Engine const& engine, std::string const& graph,
                       std::string const& path) const;
    void place_weights();
    void read_kernels();

    CudaDevice device_;
    Nvinfer const& nvinfer_;
    EngineFiles files_;
    std::map<std::string, GraphSpec> contracts_;
    uint64_t weight_bytes_ = 0;
    std::unique_ptr<DeviceMemory> weights_;
    std::map<std::string, DeviceAddress> addresses_;
    std::mutex mutex_;
    // In the order in which they are made: each is destroyed before those above it.
    std::unique_ptr<EngineRuntime> runtime_;
    std::unique_ptr<KernelCache> kernels_;
    std::map<std::string, std::unique_ptr<Engine>> engines_;
};

}  // namespace ssd_runtime
