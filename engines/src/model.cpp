#include "model.h"

#include <algorithm>
#include <cstdio>

#include "failure.h"
#include "files.h"
#include "ort/ort_runner.h"

namespace ssd_runtime {
namespace {

char const onnxruntime[] = "onnxruntime";

// What the process and ONNX Runtime take without any weights, and how many copies of the weights
// its kernels hold while they are packed (ssd_export/plan/memory.py measured both).
constexpr uint64_t base_bytes = 60'000'000;
constexpr double copies_float32 = 1.05, copies_half = 2.1, copies_of_codes = 1.5;
constexpr int64_t feature_maps = 5;  // of the image decoder's largest size that are alive at once

std::unique_ptr<Backend> open_backend(Bundle const& bundle, ModelRequest const& request) {
    if (!request.backend.empty() && request.backend != onnxruntime) {
        fail(SSD_INVALID_ARGUMENT, "unknown backend ", in_quotes(request.backend), "; use ",
             onnxruntime);
    }
    return open_ort_backend(bundle, request.provider.empty() ? "cpu" : request.provider,
                            request.device, request.num_threads);
}

template <size_t Size>
void copy_text(char (&target)[Size], std::string const& source) {
    std::snprintf(target, Size, "%s", source.c_str());
}

}  // namespace

Model::Model(ModelRequest const& request)
    : bundle_(request.bundle),
      prompts_(open_prompt_encoder(bundle_)),
      embeddings_(bundle_.config().text_embeddings,
                  bundle_.file(bundle_.config().text_embeddings.file)),
      backend_(open_backend(bundle_, request)) {}

void Model::describe(ssd_model_info& info) const {
    Config const& known = config();
    info.grid_rows = static_cast<uint32_t>(known.model.grid.height);
    info.grid_columns = static_cast<uint32_t>(known.model.grid.width);
    info.width = static_cast<uint32_t>(known.model.image_width());
    info.height = static_cast<uint32_t>(known.model.image_height());
    info.codebook_size = static_cast<uint32_t>(known.model.codebook_size);
    info.prompt_slots = static_cast<uint32_t>(known.policy.prompt_slots);
    info.max_images = backend().max_images();
    info.has_tokenizer = prompts_->why_no_text().empty() ? 1 : 0;
    info.cfg_scale = known.cfg_scale;
    info.temperature = known.temperature;
    copy_text(info.policy, known.policy.name);
    info.budget = known.policy.budget;
    copy_text(info.bundle_hash, bundle_.hash());
    info.num_classes = static_cast<uint32_t>(known.model.num_classes());
}

void Model::plan(uint32_t num_images, uint32_t decoder_batch, ssd_memory_plan& plan) const {
    Config const& known = config();
    size_t const item = item_bytes(known.dtype);
    int64_t const rows = known.model.rows_per_image * int64_t{num_images};
    plan.num_images = num_images;
    plan.weight_bytes = bundle_.num_bytes(known.text_embeddings.file);
    plan.cache_bytes = known.policy.cache_bytes(known.model.head_dim, item, rows);
    plan.full_cache_bytes =
        known.policy.full_cache_bytes(known.model.head_dim, item, rows,
                                      known.policy.prompt_slots + known.model.grid.num_tokens());
    auto const pixels =
        static_cast<uint64_t>(known.model.image_height() * known.model.image_width());
    plan.decoder_bytes = feature_maps * uint64_t{decoder_batch} *
                         static_cast<uint64_t>(known.model.base_channels) * pixels *
                         (backend().is_cpu() ? sizeof(float) : item);
    double const copies = !backend().is_cpu()             ? 1.0
                          : known.weight_format != "none" ? copies_of_codes
                          : known.dtype == Dtype::float32 ? copies_float32
                                                          : copies_half;
    plan.peak_bytes = base_bytes + plan.cache_bytes + plan.decoder_bytes +
                      static_cast<uint64_t>(copies * static_cast<double>(plan.weight_bytes));
    plan.free_bytes = backend().free_bytes();
}

}  // namespace ssd_runtime
