#pragma once

#include <map>
#include <string>
#include <vector>

#include "prompt.h"

namespace ssd_runtime {

// A class's row of the table and, with guidance, the row after the last class, as
// ssd_export/model/conditions.py.
class ClassEncoder : public PromptEncoder {
public:
    // content: of config.json, which may name the classes; path: for messages.
    ClassEncoder(std::string const& content, std::string const& path, int64_t num_classes);

    std::vector<int32_t> encode(std::string const& text, std::string const& kind) const override;
    void check(std::vector<int32_t> const& row, std::string const& name) const override;
    std::vector<int32_t> unconditional(size_t length) const override;
    int32_t pad_id() const override { return 0; }

private:
    std::string way_out() const;

    int32_t num_classes_;
    std::map<std::string, int32_t> numbers_;  // by name, in lower case
    std::string first_name_;
};

// Embeddings of a caption's tokens and, with them, as many rows from the end of the learned null
// caption.
class CaptionEncoder : public PromptEncoder {
public:
    // num_tokens: of the null caption.
    explicit CaptionEncoder(int64_t num_tokens) : num_tokens_(static_cast<int32_t>(num_tokens)) {}

    std::string why_no_text() const override;
    std::vector<int32_t> encode(std::string const& text, std::string const& kind) const override;
    void check(std::vector<int32_t> const& row, std::string const& name) const override;
    std::vector<int32_t> unconditional(size_t length) const override;
    int32_t pad_id() const override { return num_tokens_ - 1; }

private:
    int32_t num_tokens_;
};

}  // namespace ssd_runtime
