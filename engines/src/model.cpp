#include "model.h"

#include <cstdio>

#include "backends.h"
#include "files.h"

namespace ssd_runtime {
namespace {

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
    info.embedding_width = static_cast<uint32_t>(known.model.caption_dim);
    info.num_classes = static_cast<uint32_t>(known.model.num_classes());
    bool const has_int8_decoder = known.graphs.count(int8_decoder) > 0;
    std::string const why_float = has_int8_decoder ? backend().why_float_decoder() : "";
    info.decodes_in_int8 = has_int8_decoder && why_float.empty() ? 1 : 0;
    copy_text(info.why_float_decoder, why_float);
}

void Model::plan(uint32_t num_images, uint32_t decoder_batch, ssd_memory_plan& plan) const {
    Config const& known = config();
    size_t const item = item_bytes(known.dtype);
    int64_t const rows = known.model.rows_per_image * int64_t{num_images};
    plan.num_images = num_images;
    plan.cache_bytes = known.policy.cache_bytes(known.model.head_dim, item, rows);
    plan.full_cache_bytes =
        known.policy.full_cache_bytes(known.model.head_dim, item, rows,
                                      known.policy.prompt_slots + known.model.grid.num_tokens());
    backend().estimate(decoder_batch, plan);
}

}  // namespace ssd_runtime
