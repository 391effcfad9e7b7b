#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <nlohmann/json.hpp>

#include "text_encoder.h"

namespace ssd_runtime {

class Splitter;

// The byte-level BPE of a tokenizer.json, with the ids of Hugging Face's tokenizers: text is cut
// at its added tokens, then by the regular expressions of its pre-tokenizer, and each piece is
// merged. Control tokens in the text are text.
//
// Regular expressions are Oniguruma's, which that library uses too.
class BytePairEncoder : public TextEncoder {
public:
    // Throws Failure SSD_UNAVAILABLE for a component that this class does not implement.
    BytePairEncoder(nlohmann::ordered_json const& spec, std::vector<AddedToken> added);
    ~BytePairEncoder() override;

    std::vector<int32_t> encode(std::string const& text) const override;

private:
    struct Piece {
        std::string_view text;
        int32_t id;  // of an added token, or -1
    };

    struct Symbol {
        int32_t id;  // -1: merged into the one before it
        int32_t previous, next;
    };

    void read_model(nlohmann::ordered_json const& model);
    std::vector<Piece> cut_at_added(std::vector<Piece> const& pieces, bool normalized) const;
    void find_added(std::string_view text, bool normalized, std::vector<Piece>& pieces) const;
    AddedToken const* longest_at(std::string_view text, size_t start, bool normalized) const;
    void merge(std::string_view bytes, std::vector<int32_t>& ids) const;
    void merge_all(std::vector<Symbol>& symbols) const;

    std::vector<AddedToken> added_;
    std::unique_ptr<Splitter> splitter_;
    std::unordered_map<std::string, int32_t> vocabulary_;
    std::unordered_map<uint64_t, std::pair<int32_t, int32_t>> merges_;  // pair -> (rank, new id)
    bool ignore_merges_ = false;
};

}  // namespace ssd_runtime
