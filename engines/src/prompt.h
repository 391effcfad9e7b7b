#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "config.h"
#include "files.h"
#include "text_encoder.h"

namespace ssd_runtime {

// Rows of N prompts: the N conditional ones, then with guidance the N unconditional ones. ids:
// [rows, width], padded on the right; lengths: the ids of a row that count.
struct EncodedPrompts {
    std::vector<int32_t> ids, lengths;
    int64_t width;
};

// Prompts to token ids, exactly as ssd_export/model/prompt.py: control tokens are found by name,
// and what a user types is text, never control.
class PromptEncoder {
public:
    // content: of tokenizer.json; path: for messages. Throws Failure SSD_BAD_BUNDLE for one that is
    // damaged or of another model.
    PromptEncoder(std::string const& content, std::string const& path);

    // False where this build has no tokenizer, or not the one of this bundle: see reason().
    bool has_tokenizer() const { return text_ != nullptr; }

    // The conditional row of a prompt. Throws Failure for an empty prompt, one that is not UTF-8,
    // that spells a control token, or where there is no tokenizer.
    std::vector<int32_t> encode(std::string const& prompt) const;

    // All rows. Throws Failure for a row that is too long, or not one that `encode` could make.
    EncodedPrompts rows(std::vector<std::vector<int32_t>> conditional,
                        std::vector<std::string> const& names, int64_t prompt_slots,
                        int64_t vocabulary_size, bool with_guidance) const;

private:
    std::vector<int32_t> text_ids(std::string const& text, bool strip_left, bool strip_right) const;
    void check_row(std::vector<int32_t> const& row, std::string const& name, int64_t prompt_slots,
                   int64_t vocabulary_size) const;
    AddedToken const& control(std::string const& name) const;
    bool is_control(std::string const& name) const { return control_.count(name) > 0; }

    std::map<std::string, AddedToken> control_;
    std::unique_ptr<TextEncoder> text_;
    std::string reason_;
};

// Rows of the text embedding table, read from the mapped weights file.
class Embeddings {
public:
    Embeddings(TextEmbeddings const& entry, std::string const& path);

    // float32 [ids, width]
    std::vector<float> rows(std::vector<int32_t> const& ids) const;

private:
    TextEmbeddings entry_;
    MappedFile file_;
};

}  // namespace ssd_runtime
