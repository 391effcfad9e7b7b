#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "prompt.h"
#include "text_encoder.h"

namespace ssd_runtime {

// Prompts of Janus-Pro, exactly as ssd_export/model/prompt.py: control tokens are found by name,
// and what a user types is text, never control.
class TemplateEncoder : public PromptEncoder {
public:
    // content: of tokenizer.json; path: for messages; prompt_slots: the longest row. Throws Failure
    // SSD_BAD_BUNDLE for a file that is damaged or of another model.
    TemplateEncoder(std::string const& content, std::string const& path, int64_t prompt_slots,
                    int64_t vocabulary_size);

    std::string why_no_text() const override { return reason_; }
    std::vector<int32_t> encode(std::string const& text, std::string const& kind) const override;
    void check(std::vector<int32_t> const& row, std::string const& name) const override;
    std::vector<int32_t> unconditional(size_t length) const override;
    int32_t pad_id() const override;

private:
    std::vector<int32_t> text_ids(std::string const& text, std::string const& kind, bool strip_left,
                                  bool strip_right) const;
    AddedToken const& control(std::string const& name) const { return control_.at(name); }
    bool is_control(std::string const& name) const { return control_.count(name) > 0; }

    int64_t prompt_slots_, vocabulary_size_;
    std::map<std::string, AddedToken> control_;
    std::unique_ptr<TextEncoder> text_;
    std::string reason_;
};

}  // namespace ssd_runtime
