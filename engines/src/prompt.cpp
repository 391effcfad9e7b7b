#include "prompt.h"

#include <algorithm>
#include <cstring>

#include "failure.h"
#include "half.h"
#include "unicode.h"

namespace ssd_runtime {
namespace {

using Json = nlohmann::ordered_json;

std::string const bos = "<｜begin▁of▁sentence｜>";
std::string const pad = "<｜▁pad▁｜>";
std::string const begin_of_image = "<begin_of_image>";
std::string const user = "<|User|>";
std::string const assistant = "<|Assistant|>";

bool is_bracketed(std::string const& name) {
    return name.size() > 2 && name.front() == '<' && name.back() == '>';
}

// Some added tokens are letters that the vocabulary lacks: text. Those named <...> are control,
// whether or not the file calls them special.
std::vector<AddedToken> added_tokens(Json const& spec) {
    std::vector<AddedToken> added;
    for (auto const& token : spec.at("added_tokens")) {
        std::string const content = token.at("content").get<std::string>();
        bool const special = token.at("special").get<bool>();
        added.push_back({content, token.at("id").get<int32_t>(), special || is_bracketed(content),
                         token.value("normalized", !special), token.value("single_word", false),
                         token.value("lstrip", false), token.value("rstrip", false)});
    }
    return added;
}

}  // namespace

constexpr size_t MAX_REASON = 120;  // characters of a library's own words

PromptEncoder::PromptEncoder(std::string const& content, std::string const& path) try {
    Json const spec = Json::parse(content);
    std::vector<AddedToken> added = added_tokens(spec);
    for (AddedToken const& token : added) {
        if (token.is_control) {
            control_.insert_or_assign(token.content, token);
        }
    }
    for (std::string const& name : {bos, pad, begin_of_image}) {
        if (!is_control(name)) {
            fail(SSD_BAD_BUNDLE, path, ": tokenizer.json lacks the added token ", name,
                 ": give a Janus-Pro tokenizer");
        }
    }
    try {
        text_ = open_text_encoder(spec, std::move(added));
    } catch (Failure const& failure) {
        if (failure.status() != SSD_UNAVAILABLE) {
            throw;
        }
        reason_ = failure.what();
    }
} catch (Json::exception const& error) {
    fail(SSD_BAD_BUNDLE, path, " is not a tokenizer.json (",
         std::string(error.what()).substr(0, MAX_REASON), "): download it again");
} catch (std::out_of_range const&) {
    fail(SSD_BAD_BUNDLE, path,
         " is not a tokenizer.json (a merge is not in the vocabulary): download it again");
}

AddedToken const& PromptEncoder::control(std::string const& name) const {
    return control_.at(name);
}

std::vector<int32_t> PromptEncoder::encode(std::string const& prompt) const {
    if (!has_tokenizer()) {
        throw Failure(SSD_UNAVAILABLE, reason_);
    }
    if (!is_utf8(prompt)) {
        fail(SSD_INVALID_ARGUMENT, "the prompt ", in_quotes(prompt),
             " is not valid Unicode: type it in UTF-8");
    }
    std::string const text(trim(prompt));
    if (text.empty()) {
        fail(SSD_INVALID_ARGUMENT, "the prompt is empty: say what to generate");
    }
    // Text between two control tokens is encoded in one piece: a word merges with the space before.
    std::vector<int32_t> ids{control(bos).id};
    std::string pending;
    bool strip_left = control(bos).rstrip;
    auto const flush = [&](bool strip_right) {
        std::vector<int32_t> const part = text_ids(pending, strip_left, strip_right);
        ids.insert(ids.end(), part.begin(), part.end());
        pending.clear();
    };
    for (std::string const& part : {user, ": " + text + "\n\n", assistant, std::string(":")}) {
        bool const is_name = part == user || part == assistant;
        if (!is_name || !is_control(part)) {
            pending += part;
            continue;
        }
        flush(control(part).lstrip);
        ids.push_back(control(part).id);
        strip_left = control(part).rstrip;
    }
    flush(control(begin_of_image).lstrip);
    ids.push_back(control(begin_of_image).id);
    return ids;
}

std::vector<int32_t> PromptEncoder::text_ids(std::string const& text, bool strip_left,
                                             bool strip_right) const {
    std::string_view kept = strip_left ? trim_left(text) : std::string_view(text);
    kept = strip_right ? trim_right(kept) : kept;
    std::vector<int32_t> ids = text_->encode(std::string(kept));
    for (int32_t const id : ids) {
        for (auto const& [name, token] : control_) {
            if (token.id == id) {
                fail(SSD_INVALID_ARGUMENT, "the prompt spells the control token ", name,
                     ": remove it, or put spaces in between");
            }
        }
    }
    return ids;
}

void PromptEncoder::check_row(std::vector<int32_t> const& row, std::string const& name,
                              int64_t prompt_slots, int64_t vocabulary_size) const {
    auto const length = static_cast<int64_t>(row.size());
    if (length > prompt_slots) {
        fail(SSD_INVALID_ARGUMENT, "the prompt ", name, " is ", length, " tokens long, ",
             prompt_slots, " fit: shorten it by ", length - prompt_slots,
             " tokens or export with --prompt-slots ", length);
    }
    if (length < 3 || row.front() != control(bos).id || row.back() != control(begin_of_image).id) {
        fail(SSD_INVALID_ARGUMENT, "the prompt ", name,
             " does not begin and end with the bundle's control tokens; make the ids with "
             "`ssd-export prompts`");
    }
    auto const bad = std::find_if(row.begin(), row.end(), [vocabulary_size](int32_t id) {
        return id < 0 || id >= vocabulary_size;
    });
    if (bad != row.end()) {
        fail(SSD_INVALID_ARGUMENT, "the prompt ", name, " has the token id ", *bad,
             ", and ids end at ", vocabulary_size - 1, "; make them with `ssd-export prompts`");
    }
}

EncodedPrompts PromptEncoder::rows(std::vector<std::vector<int32_t>> conditional,
                                   std::vector<std::string> const& names, int64_t prompt_slots,
                                   int64_t vocabulary_size, bool with_guidance) const {
    for (size_t i = 0; i < conditional.size(); ++i) {
        check_row(conditional[i], names[i], prompt_slots, vocabulary_size);
    }
    std::vector<std::vector<int32_t>> every = std::move(conditional);
    for (size_t i = 0, count = with_guidance ? every.size() : 0; i < count; ++i) {
        std::vector<int32_t> row(every[i].size(), control(pad).id);
        row.front() = control(bos).id;
        row.back() = control(begin_of_image).id;
        every.push_back(std::move(row));
    }
    EncodedPrompts encoded{{}, {}, 0};
    for (auto const& row : every) {
        encoded.lengths.push_back(static_cast<int32_t>(row.size()));
        encoded.width = std::max<int64_t>(encoded.width, encoded.lengths.back());
    }
    for (auto& row : every) {
        row.resize(static_cast<size_t>(encoded.width), control(pad).id);
        encoded.ids.insert(encoded.ids.end(), row.begin(), row.end());
    }
    return encoded;
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
