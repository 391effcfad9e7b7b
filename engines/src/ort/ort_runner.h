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

void list_ort_devices(std::vector<ssd_device>& devices);

// The caches of one generation. An output that the contract aliases is bound to the very value of
// its input, which makes ONNX Runtime write one row instead of copying a cache.
class OrtRunner : public Runner {
public:
    OrtRunner(Bundle const& bundle, std::shared_ptr<OrtSessions> sessions);

    void prefill(PromptBatch const& batch) override;
    void decode_row(int64_t first, int64_t last, std::atomic<bool> const& stop) override;
    std::string why_no_window() const override;
    bool opens_again() const override { return sessions_->holds_one(); }
    bool fuses_steps() const override { return sessions_->fuses("decode_step"); }
    int cpu_threads() const override { return sessions_->is_cuda() ? 0 : sessions_->num_threads(); }
    SampledWindow decode_window(Window const& window) override;
    std::vector<int32_t> tokens() override;
    void decode_image(int32_t const* codes, int64_t count, uint8_t* pixels) override;
    uint64_t cache_bytes() const override;
    void interrupt() override { run_options_.SetTerminate(); }

private:
    using Values = std::map<std::string, Ort::Value>;
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
    Ort::Value new_value(TensorSpec const& tensor, std::map<std::string, int64_t> const& sizes);
    Ort::Value on_host(TensorSpec const& tensor, void* data, size_t num_bytes,
                       std::map<std::string, int64_t> const& sizes) const;
    void fill_caches(GraphSpec const& prefill, std::vector<Ort::Value> const& results,
                     PromptBatch const& batch);
    template <typename Write>
    void fill(Ort::Value& value, Write write);
    void upload(std::string const& name, void const* data, size_t num_bytes);
    void upload(std::string const& name, Ort::Value& value, void const* data, size_t num_bytes);
    void plan_evictions(std::vector<int32_t> const& lengths);
    void run(std::string const& graph, int64_t step);
    void evict(int64_t step);
    void evict_images(Window const& window);
    void evict_rows(std::string const& graph, int64_t step, std::vector<size_t> const& rows);
    Values& window_values(std::string const& graph, int64_t width);
    std::vector<std::byte> download(Ort::Value const& value) const;
    template <typename Item>
    std::vector<Item> items_of(Ort::Value const& value) const;
    void check_finite(Ort::Value const& logits, int64_t step) const;
    void copy_back(GraphSpec const& evict);
    Bound& bound(std::string const& graph, int64_t width = 0);
    std::vector<Ort::Value> run_once(std::string const& graph,
                                     std::map<std::string, Ort::Value> const& feeds);

    Config const& config_;
    std::shared_ptr<OrtSessions> sessions_;
    Ort::RunOptions run_options_;
    Ort::MemoryInfo host_, device_;
    std::map<std::string, int64_t> sizes_;  // images, rows
    std::vector<ImageSeed> images_;
    bool is_greedy_ = false;
    int64_t noise_row_ = 0;  // the grid row whose noise the steps have
    std::string suffix_;     // of the graphs that sample as the batch wants it
    std::string step_graph_;
    std::unique_ptr<Ort::Allocator> allocator_;  // of the device; before the values it made
    Values values_;
    std::map<int64_t, Values> windows_;  // what decode_window has for itself, by its width
    std::map<std::string, Bound> bound_;
    std::map<int64_t, std::vector<std::string>> evictions_;  // step -> graphs to run before it
};

}  // namespace ssd_runtime
