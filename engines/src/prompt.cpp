#include "prompt.h"

#include <cstring>

#include "conditions.h"
#include "failure.h"
#include "half.h"
#include "template_encoder.h"
#include "unicode.h"

namespace ssd_runtime {
namespace {

constexpr size_t max_prompt_file_bytes = size_t{64} << 20U;

}  // namespace

std::unique_ptr<PromptEncoder> open_prompt_encoder(Bundle const& bundle) {
    Config const& config = bundle.config();
    if (config.model.caption_dim > 0) {
        return std::make_unique<CaptionEncoder>(config.model.vocab_size);
    }
    bool const is_janus = config.model.family == "janus";
    std::string const path = bundle.file(is_janus ? "tokenizer.json" : "config.json");
    std::string content;
    read_file(path, max_prompt_file_bytes, content);
    if (is_janus) {
        return std::make_unique<TemplateEncoder>(content, path, config.policy.prompt_slots,
                                                 config.model.vocab_size);
    }
    return std::make_unique<ClassEncoder>(content, path, config.model.num_classes());
}

std::string checked_text(std::string const& typed, std::string const& kind) {
    if (!is_utf8(typed)) {
        fail(SSD_INVALID_ARGUMENT, "the ", kind, " ", in_quotes(typed),
             " is not valid Unicode: type it in UTF-8");
    }
    std::string text(trim(typed));
    if (text.empty()) {
        fail(SSD_INVALID_ARGUMENT, "the ", kind, " is empty: say what to generate");
    }
    return text;
}

Embeddings::Embeddings(TextEmbeddings const& entry, std::string const& path)
    : entry_(entry), file_(path) {
    uint64_t const wanted = num_elements({entry.num_rows, entry.width}) *
                            static_cast<uint64_t>(item_bytes(entry.dtype));
    if (entry.offset > file_.size() || wanted > file_.size() - entry.offset) {
        fail(SSD_BAD_BUNDLE, "bundle ", path.substr(0, path.size() - entry.file.size() - 1),
             ": the text embeddings end at byte ", std::to_string(entry.offset + wanted), " and ",
             entry.file, " has ", std::to_string(file_.size()),
             "; export it again with --force, or copy it again from where it came");
    }
}

std::vector<float> Embeddings::rows(std::vector<int32_t> const& ids) const {
    auto const width = static_cast<size_t>(entry_.width);
    size_t const row_bytes = width * item_bytes(entry_.dtype);
    std::vector<float> values(ids.size() * width);
    for (size_t i = 0; i < ids.size(); ++i) {
        std::byte const* row =
            file_.data() + entry_.offset + static_cast<size_t>(ids[i]) * row_bytes;
        float* const out = values.data() + i * width;
        if (entry_.dtype == Dtype::float32) {
            std::memcpy(out, row, row_bytes);
            continue;
        }
        for (size_t k = 0; k < width; ++k) {
            uint16_t half = 0;
            std::memcpy(&half, row + 2 * k, sizeof half);
            out[k] = entry_.dtype == Dtype::bfloat16 ? from_bfloat16(half) : from_float16(half);
        }
    }
    return values;
}

}  // namespace ssd_runtime
