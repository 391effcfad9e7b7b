#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"
#include "files.h"

namespace ssd_runtime {

// Prompts to the rows of a model's table of condition embeddings, by its family
// (ssd_export/model/families). Messages call a prompt by its kind ("negative prompt") and, with
// what it is, by its name ("negative prompt 'a blue square'").
class PromptEncoder {
public:
    virtual ~PromptEncoder() = default;

    // Why text is not encoded, with the way out; "" where it is.
    virtual std::string why_no_text() const { return ""; }

    // The conditional row of a text: valid UTF-8 without white space at its ends, and not empty.
    // Throws Failure for one that has none.
    virtual std::vector<int32_t> encode(std::string const& text, std::string const& kind) const = 0;

    // Throws Failure for a row that `encode` could not make.
    virtual void check(std::vector<int32_t> const& row, std::string const& name) const = 0;

    // The model's own unconditional row beside a conditional one of so many ids.
    virtual std::vector<int32_t> unconditional(size_t length) const = 0;

    // What short rows are padded with.
    virtual int32_t pad_id() const = 0;
};

// The encoder of a bundle's family. Throws Failure SSD_BAD_BUNDLE for prompt files that are damaged
// or of another model.
std::unique_ptr<PromptEncoder> open_prompt_encoder(Bundle const& bundle);

// A text as `encode` takes it. Throws Failure where nothing is left, or it is not UTF-8.
std::string checked_text(std::string const& typed, std::string const& kind);

// Rows of the table of condition embeddings, read from the mapped weights file.
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
