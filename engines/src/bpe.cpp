#include "bpe.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <tuple>

#include "failure.h"
#include "split.h"
#include "unicode.h"

namespace ssd_runtime {
namespace {

using Json = nlohmann::ordered_json;

uint64_t pair_key(int32_t left, int32_t right) {
    return (uint64_t{static_cast<uint32_t>(left)} << 32U) | static_cast<uint32_t>(right);
}

// The printable character that stands for each byte in a byte-level vocabulary, in UTF-8.
std::vector<std::string> const& byte_characters() {
    static std::vector<std::string> const* const table = [] {
        auto* characters = new std::vector<std::string>(256);
        uint32_t next = 256;
        for (uint32_t byte = 0; byte < 256; ++byte) {
            bool const printable =
                (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
            (*characters)[byte] = utf8_of(printable ? byte : next++);
        }
        return characters;
    }();
    return *table;
}

void want_null(Json const& model, char const* key) {
    auto const found = model.find(key);
    bool const is_plain = found == model.end() || found->is_null() ||
                          (found->is_boolean() && !found->get<bool>()) ||
                          (found->is_string() && found->get<std::string>().empty());
    if (!is_plain) {
        fail(SSD_UNAVAILABLE, "tokenizer.json's model has ", key,
             ", which ssd_runtime does not have; give token ids (`ssd-export prompts`)");
    }
}

bool is_empty_normalizer(Json const& spec) {
    auto const found = spec.find("normalizer");
    return found == spec.end() || found->is_null() ||
           (found->value("type", "") == "Sequence" && found->at("normalizers").empty());
}

}  // namespace

BytePairEncoder::BytePairEncoder(Json const& spec, std::vector<AddedToken> added)
    : added_(std::move(added)), splitter_(std::make_unique<Splitter>(spec.at("pre_tokenizer"))) {
    if (!is_empty_normalizer(spec)) {
        fail(SSD_UNAVAILABLE,
             "tokenizer.json has a normalizer, which ssd_runtime does not have; "
             "give token ids (`ssd-export prompts`)");
    }
    read_model(spec.at("model"));
}

BytePairEncoder::~BytePairEncoder() = default;

void BytePairEncoder::read_model(Json const& model) {
    if (model.value("type", "BPE") != "BPE") {
        fail(SSD_UNAVAILABLE, "tokenizer.json has a ", model.value("type", ""),
             " model, and ssd_runtime has BPE; give token ids (`ssd-export prompts`)");
    }
    for (char const* key : {"dropout", "unk_token", "continuing_subword_prefix",
                            "end_of_word_suffix", "byte_fallback"}) {
        want_null(model, key);
    }
    ignore_merges_ = model.value("ignore_merges", false);
    for (auto const& [token, id] : model.at("vocab").items()) {
        vocabulary_.emplace(token, token_id(id));
    }
    int32_t rank = 0;
    for (auto const& merge : model.at("merges")) {
        std::string left, right;
        if (merge.is_string()) {
            std::string const both = merge.get<std::string>();
            size_t const space = both.find(' ');
            left = both.substr(0, space);
            right = both.substr(space + 1);
        } else {
            left = merge.at(0).get<std::string>();
            right = merge.at(1).get<std::string>();
        }
        merges_.insert_or_assign(pair_key(vocabulary_.at(left), vocabulary_.at(right)),
                                 std::make_pair(rank++, vocabulary_.at(left + right)));
    }
}

std::vector<int32_t> BytePairEncoder::encode(std::string const& text) const {
    // Added tokens that a normalizer would not touch are found before those that it would.
    std::vector<Piece> const pieces = cut_at_added(cut_at_added({{text, -1}}, false), true);
    std::vector<int32_t> ids;
    for (Piece const& piece : pieces) {
        if (piece.id >= 0) {
            ids.push_back(piece.id);
            continue;
        }
        for (std::string const& part : splitter_->split(piece.text)) {
            merge(part, ids);
        }
    }
    return ids;
}

std::vector<BytePairEncoder::Piece> BytePairEncoder::cut_at_added(std::vector<Piece> const& pieces,
                                                                  bool normalized) const {
    std::vector<Piece> cut;
    for (Piece const& piece : pieces) {
        if (piece.id >= 0) {
            cut.push_back(piece);
        } else {
            find_added(piece.text, normalized, cut);
        }
    }
    return cut;
}

void BytePairEncoder::find_added(std::string_view text, bool normalized,
                                 std::vector<Piece>& pieces) const {
    size_t done = 0;  // everything before it is in pieces
    for (size_t at = 0; at < text.size();) {
        AddedToken const* const token = longest_at(text, at, normalized);
        if (token == nullptr) {
            ++at;
            continue;
        }
        size_t begin = at;
        size_t end = at + token->content.size();
        at = end;
        bool const inside_a_word = token->single_word && (ends_with_word(text.substr(0, begin)) ||
                                                          begins_with_word(text.substr(end)));
        if (token->is_control || inside_a_word || begin < done) {
            continue;
        }
        if (token->lstrip) {
            begin = std::max(trim_right(text.substr(0, begin)).size(), done);
        }
        if (token->rstrip) {
            end = text.size() - trim_left(text.substr(end)).size();
        }
        if (begin > done) {
            pieces.push_back({text.substr(done, begin - done), -1});
        }
        pieces.push_back({text.substr(begin, end - begin), token->id});
        done = end;
    }
    if (done < text.size()) {
        pieces.push_back({text.substr(done), -1});
    }
}

AddedToken const* BytePairEncoder::longest_at(std::string_view text, size_t start,
                                              bool normalized) const {
    AddedToken const* longest = nullptr;
    for (AddedToken const& token : added_) {
        if (token.normalized == normalized && !token.content.empty() &&
            text.compare(start, token.content.size(), token.content) == 0 &&
            (longest == nullptr || token.content.size() > longest->content.size())) {
            longest = &token;
        }
    }
    return longest;
}

void BytePairEncoder::merge(std::string_view bytes, std::vector<int32_t>& ids) const {
    std::string whole;
    std::vector<Symbol> symbols;
    for (char const byte : bytes) {
        std::string const& character = byte_characters()[static_cast<unsigned char>(byte)];
        whole += character;
        auto const found = vocabulary_.find(character);
        if (found != vocabulary_.end()) {  // else: dropped, as there is no unknown token
            auto const place = static_cast<int32_t>(symbols.size());
            symbols.push_back({found->second, place - 1, place + 1});
        }
    }
    auto const known = ignore_merges_ ? vocabulary_.find(whole) : vocabulary_.end();
    if (known != vocabulary_.end()) {
        ids.push_back(known->second);
        return;
    }
    merge_all(symbols);
    for (Symbol const& symbol : symbols) {
        if (symbol.id >= 0) {
            ids.push_back(symbol.id);
        }
    }
}

// Lowest rank first, then leftmost; candidates that a merge has overtaken are passed over.
void BytePairEncoder::merge_all(std::vector<Symbol>& symbols) const {
    using Candidate = std::tuple<int32_t, int32_t, uint64_t, int32_t>;  // rank, place, pair, new id
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
    auto const size = static_cast<int32_t>(symbols.size());
    auto const at = [&symbols](int32_t place) -> Symbol& {
        return symbols[static_cast<size_t>(place)];
    };
    auto const consider = [&](int32_t place) {
        if (place < 0 || at(place).next >= size) {
            return;
        }
        uint64_t const pair = pair_key(at(place).id, at(at(place).next).id);
        auto const found = merges_.find(pair);
        if (found != merges_.end()) {
            candidates.emplace(found->second.first, place, pair, found->second.second);
        }
    };
    for (int32_t place = 0; place < size; ++place) {
        consider(place);
    }
    while (!candidates.empty()) {
        auto const [rank, place, pair, id] = candidates.top();
        candidates.pop();
        int32_t const next = at(place).next;
        if (at(place).id < 0 || next >= size || pair_key(at(place).id, at(next).id) != pair) {
            continue;
        }
        at(place) = {id, at(place).previous, at(next).next};
        at(next).id = -1;
        if (at(place).next < size) {
            at(at(place).next).previous = place;
        }
        consider(place);
        consider(at(place).previous);
    }
}

std::unique_ptr<TextEncoder> open_text_encoder(Json const& spec, std::vector<AddedToken> added) {
    return std::make_unique<BytePairEncoder>(spec, std::move(added));
}

}  // namespace ssd_runtime
