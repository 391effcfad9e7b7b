#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ort/ort_session.h"
#include "runner.h"

namespace ssd_runtime {

// ONNX Runtime as a backend: CPU, or a CUDA GPU.
std::unique_ptr<Backend> open_ort_backend(Bundle const& bundle, std::string const& provider,
                                          int device, int num_threads);

// The caches of one generation. An output that the contract aliases is bound to the very value of
// its input, which makes ONNX Runtime write one row instead of copying a cache.
class OrtRunner : public Runner {
public:
    OrtRunner(Bundle const& bundle, std::shared_ptr<OrtSessions> sessions);

    void prefill(PromptBatch const& batch) override;
    void decode_row(int64_t first, int64_t last, std::atomic<bool> const& stop) override;
    std::vector<int32_t> tokens() override;
    void decode_image(int32_t const* codes, int64_t count, uint8_t* pixels) override;
    uint64_t cache_bytes() const override;
    void interrupt() override { run_options_.SetTerminate(); }

private:
    // A graph with its values bound.
    struct Bound {
        GraphSpec const* spec;
        std::shared_ptr<Ort::Session> session;
        Ort::IoBinding binding;
    };

    void allocate(int64_t num_images, std::string const& step_graph);
    std::vector<TensorSpec> inputs_of(GraphSpec const& spec) const;
    std::vector<std::byte> content_of(TensorSpec const& tensor, PromptBatch const& batch) const;
    std::vector<float> noise_of_row(int64_t row) const;
    Ort::Value new_value(TensorSpec const& tensor);
    Ort::Value on_host(TensorSpec const& tensor, void* data, size_t num_bytes) const;
    void fill_caches(GraphSpec const& prefill, std::vector<Ort::Value> const& results,
                     PromptBatch const& batch);
    template <typename Write>
    void fill(std::string const& name, Write write);
    void upload(std::string const& name, void const* data, size_t num_bytes);
    void plan_evictions(std::vector<int32_t> const& lengths);
    void run(std::string const& graph, int64_t step);
    void copy_back(GraphSpec const& evict);
    Bound& bound(std::string const& graph);
    std::vector<Ort::Value> run_once(std::string const& graph,
                                     std::map<std::string, Ort::Value> const& feeds);

    Config const& config_;
    std::shared_ptr<OrtSessions> sessions_;
    Ort::RunOptions run_options_;
    Ort::MemoryInfo host_, device_;
    std::map<std::string, int64_t> sizes_;  // images, rows
    std::vector<ImageSeed> images_;
    bool is_greedy_ = false;
    std::string step_graph_;
    std::unique_ptr<Ort::Allocator> allocator_;  // of the device; before the values it made
    std::map<std::string, Ort::Value> values_;
    std::map<std::string, Bound> bound_;
    std::map<int64_t, std::vector<std::string>> evictions_;  // step -> graphs to run before it
};

}  // namespace ssd_runtime
