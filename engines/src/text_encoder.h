#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace ssd_runtime {

// An added token of a tokenizer.json.
struct AddedToken {
    std::string content;
    int32_t id;
    bool is_control, normalized, single_word, lstrip, rstrip;
};

// A token id of a tokenizer.json. Throws for what is no whole number from 0 on, and for one that
// int32 does not hold: get<int32_t>() would convert both, a fraction too large with undefined
// behavior.
int32_t token_id(nlohmann::ordered_json const& value);

// Text to token ids; control tokens in the text are text.
class TextEncoder {
public:
    virtual ~TextEncoder() = default;
    // text: valid UTF-8.
    virtual std::vector<int32_t> encode(std::string const& text) const = 0;
};

// The encoder of a tokenizer.json. Throws Failure SSD_UNAVAILABLE where this build has none for it.
std::unique_ptr<TextEncoder> open_text_encoder(nlohmann::ordered_json const& spec,
                                               std::vector<AddedToken> added);

}  // namespace ssd_runtime
