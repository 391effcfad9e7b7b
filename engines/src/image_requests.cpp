#include "image_requests.h"

#include <algorithm>
#include <cmath>

#include "failure.h"
#include "unicode.h"

namespace ssd_runtime {
namespace {

constexpr uint64_t most_images = 1U << 20U;
char const prompt_kind[] = "prompt";
char const negative_kind[] = "negative prompt";

bool says_nothing(ssd_prompt const& prompt) {
    return prompt.text != nullptr ? is_utf8(prompt.text) && trim(prompt.text).empty()
                                  : prompt.ids == nullptr;
}

void check_sampling(ssd_generate_params const& params) {
    constexpr float most_cfg_scale = 1e6F;  // guided logits stay finite up to here
    if (std::isnan(params.cfg_scale)) {
        fail(SSD_INVALID_ARGUMENT, "cfg_scale nan is not a number; use 5, or 1 for no guidance");
    }
    if (!(params.cfg_scale >= 0 && params.cfg_scale <= most_cfg_scale)) {
        fail(SSD_INVALID_ARGUMENT, "cfg_scale ", params.cfg_scale, " is outside 0 .. ",
             most_cfg_scale, "; use 5, or 1 for no guidance");
    }
    if (std::isnan(params.temperature)) {
        fail(SSD_INVALID_ARGUMENT, "temperature nan is not a number; use 1.0, or 0 for greedy");
    }
    if (!(std::isfinite(params.temperature) && params.temperature >= 0)) {
        fail(SSD_INVALID_ARGUMENT, "temperature ", params.temperature,
             " is not a finite number of at least 0; use 1.0, or 0 for greedy");
    }
    if (params.top_k > INT32_MAX) {
        fail(SSD_INVALID_ARGUMENT, "top_k ", params.top_k, " is above ", INT32_MAX,
             "; use 0 for all tokens");
    }
}

void check_counts(ssd_generate_params const& params) {
    bool const has_prompts = params.prompts != nullptr || params.embeddings != nullptr;
    if (params.num_prompts == 0 || !has_prompts) {
        fail(SSD_INVALID_ARGUMENT, "no prompt: say what to generate");
    }
    if (params.num_images < 1) {
        fail(SSD_INVALID_ARGUMENT, "num_images 0 is below 1; use 1 or more");
    }
    if (params.num_prompts > most_images / params.num_images) {
        fail(SSD_INVALID_ARGUMENT, params.num_prompts, " prompts with ", params.num_images,
             " images each are more than the ", most_images,
             " of one generation; make several generations");
    }
}

}  // namespace

ImageRequests::ImageRequests(std::shared_ptr<Model> model, ssd_generate_params const& params)
    : model_(std::move(model)),
      sampling_{params.cfg_scale, params.temperature, int64_t{params.top_k}},
      seed_(params.seed),
      images_per_prompt_(params.num_images) {
    check_sampling(params);
    check_counts(params);
    if (params.embeddings != nullptr) {
        read_embeddings(params);
    }
    for (size_t i = conditional_.size(); i < params.num_prompts; ++i) {
        if (params.prompts[i].text == nullptr && params.prompts[i].ids == nullptr) {
            fail(SSD_INVALID_ARGUMENT, "prompt ", i,
                 " has neither text nor ids: say what to generate");
        }
        conditional_.push_back(read(params.prompts[i], prompt_kind, i));
    }
    bool const has_guidance = model_->config().model.rows_per_image == 2;
    if (!has_guidance && params.cfg_scale != 1) {
        fail(SSD_INVALID_ARGUMENT,
             "the model has no unconditional row, so there is no guidance: use cfg_scale 1");
    }
    read_unconditional(params);
    if (!has_guidance) {
        unconditional_.clear();
    }
    if (params.seeds != nullptr) {
        if (params.num_seeds != num_images()) {
            fail(SSD_INVALID_ARGUMENT, params.num_seeds, " seeds for ", num_images(),
                 " images; give one for each image");
        }
        seeds_.assign(params.seeds, params.seeds + params.num_seeds);
    }
}

ImageRequests::Row ImageRequests::read(ssd_prompt const& prompt, std::string const& kind,
                                       size_t index) const {
    PromptEncoder const& encoder = model_->prompts();
    if (prompt.text == nullptr) {
        Row row(prompt.ids, prompt.ids + prompt.num_ids);
        encoder.check(row, text(kind, " number ", index));
        return row;
    }
    Row row = encoder.encode(checked_text(prompt.text, kind), kind);
    encoder.check(row, kind + " " + in_quotes(prompt.text));
    return row;
}

void ImageRequests::read_embeddings(ssd_generate_params const& params) {
    Config const& config = model_->config();
    auto const width = static_cast<size_t>(config.model.caption_dim);
    if (width == 0) {
        fail(SSD_INVALID_ARGUMENT,
             "this model encodes its prompts itself: give prompts, not embeddings");
    }
    auto const most =
        static_cast<size_t>(std::min(config.policy.prompt_slots, config.model.vocab_size));
    for (size_t i = 0; i < params.num_prompts; ++i) {
        size_t const length = params.embedding_tokens == nullptr ? 0 : params.embedding_tokens[i];
        if (params.embeddings[i] == nullptr || length < 1 || length > most) {
            fail(SSD_INVALID_ARGUMENT, "prompt embeddings of ", length, " tokens, and 1 to ", most,
                 " fit: shorten the prompt");
        }
        given_.emplace_back(params.embeddings[i], params.embeddings[i] + length * width);
        if (!std::all_of(given_.back().begin(), given_.back().end(),
                         [](float value) { return std::isfinite(value); })) {
            fail(SSD_INVALID_ARGUMENT,
                 "prompt embeddings hold NaN or infinity: embed the prompts again");
        }
        conditional_.push_back(model_->prompts().unconditional(length));
    }
}

// The conditional row of a negative prompt, of its own length, stands for the unconditional one.
void ImageRequests::read_unconditional(ssd_generate_params const& params) {
    size_t const given = params.negative_prompts == nullptr ? 0 : params.num_negative_prompts;
    size_t const num_prompts = conditional_.size();
    if (given > 1 && given != num_prompts && given != num_images()) {
        fail(SSD_INVALID_ARGUMENT, given, " negative prompts for ", num_prompts,
             " prompts; give one for all, or one for each prompt or each image");
    }
    size_t const count = std::max(given, num_prompts);
    for (size_t i = 0; i < count; ++i) {
        size_t const index = given == 1 ? 0 : i;
        if (given == 0 || says_nothing(params.negative_prompts[index])) {
            Row const& beside = conditional_[i * num_prompts / count];
            unconditional_.push_back(model_->prompts().unconditional(beside.size()));
            continue;
        }
        if (params.cfg_scale == 1) {
            fail(SSD_INVALID_ARGUMENT,
                 "a negative prompt does nothing at cfg_scale 1, which is no guidance; use 5, or "
                 "leave it out");
        }
        unconditional_.push_back(read(params.negative_prompts[index], negative_kind, index));
    }
}

PromptBatch ImageRequests::batch(uint32_t first, uint32_t count) const {
    std::vector<Row> rows;
    for (std::vector<Row> const* prompts : {&conditional_, &unconditional_}) {
        for (size_t image = first; image < first + count && !prompts->empty(); ++image) {
            rows.push_back((*prompts)[image * prompts->size() / num_images()]);
        }
    }
    PromptBatch batch{{}, 0, {}, {}, sampling_};
    for (Row const& row : rows) {
        batch.lengths.push_back(static_cast<int32_t>(row.size()));
        batch.width = std::max<int64_t>(batch.width, batch.lengths.back());
    }
    Row ids;
    for (Row& row : rows) {
        row.resize(static_cast<size_t>(batch.width), model_->prompts().pad_id());
        ids.insert(ids.end(), row.begin(), row.end());
    }
    batch.embeds = model_->embeddings().rows(ids);
    size_t const row_size = batch.embeds.size() / rows.size();
    for (size_t image = first; image < first + count && !given_.empty(); ++image) {
        std::vector<float> const& given = given_[image / images_per_prompt_];
        float* const row = batch.embeds.data() + (image - first) * row_size;
        std::fill(std::copy(given.begin(), given.end(), row), row + row_size, 0.0F);
    }
    for (uint32_t image = first; image < first + count; ++image) {
        batch.images.push_back(seeds_.empty() ? ImageSeed{seed_, image}
                                              : ImageSeed{seeds_[image], 0});
    }
    return batch;
}

}  // namespace ssd_runtime
