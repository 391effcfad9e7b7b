#include "template_encoder.h"

#include <algorithm>
#include <limits>

#include "failure.h"
#include "json_reader.h"
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
        added.push_back({content, token_id(token.at("id")), special || is_bracketed(content),
                         token.value("normalized", !special), token.value("single_word", false),
                         token.value("lstrip", false), token.value("rstrip", false)});
    }
    return added;
}

constexpr size_t max_reason = 120;  // characters of a library's own words

}  // namespace

int32_t token_id(Json const& value) {
    auto const id = value.get_ref<Json::number_unsigned_t const&>();
    if (id > static_cast<uint64_t>(std::numeric_limits<int32_t>::max())) {
        fail(SSD_BAD_BUNDLE, "tokenizer.json has the token id ", id,
             ", which is too large: download it again");
    }
    return static_cast<int32_t>(id);
}

TemplateEncoder::TemplateEncoder(std::string const& content, std::string const& path,
                                 int64_t prompt_slots, int64_t vocabulary_size) try
    : prompt_slots_(prompt_slots), vocabulary_size_(vocabulary_size) {
    Json const spec = parse_json(content);
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
} catch (NotJson const& error) {
    fail(SSD_BAD_BUNDLE, path, " is not a tokenizer.json (",
         std::string(error.what()).substr(0, max_reason), "): download it again");
} catch (Json::exception const& error) {
    fail(SSD_BAD_BUNDLE, path, " is not a tokenizer.json (",
         std::string(error.what()).substr(0, max_reason), "): download it again");
} catch (std::out_of_range const&) {
    fail(SSD_BAD_BUNDLE, path,
         " is not a tokenizer.json (a merge is not in the vocabulary): download it again");
}

std::vector<int32_t> TemplateEncoder::encode(std::string const& text,
                                             std::string const& kind) const {
    if (text_ == nullptr) {
        throw Failure(SSD_UNAVAILABLE, reason_);
    }
    // Text between two control tokens is encoded in one piece: a word merges with the space before.
    std::vector<int32_t> ids{control(bos).id};
    std::string pending;
    bool strip_left = control(bos).rstrip;
    auto const flush = [&](bool strip_right) {
        std::vector<int32_t> const part = text_ids(pending, kind, strip_left, strip_right);
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

std::vector<int32_t> TemplateEncoder::text_ids(std::string const& text, std::string const& kind,
                                               bool strip_left, bool strip_right) const {
    std::string_view kept = strip_left ? trim_left(text) : std::string_view(text);
    kept = strip_right ? trim_right(kept) : kept;
    std::vector<int32_t> ids = text_->encode(std::string(kept));
    for (int32_t const id : ids) {
        for (auto const& [spelled, token] : control_) {
            if (token.id == id) {
                fail(SSD_INVALID_ARGUMENT, "the ", kind, " spells the control token ", spelled,
                     ": remove it, or put spaces in between");
            }
        }
    }
    return ids;
}

void TemplateEncoder::check(std::vector<int32_t> const& row, std::string const& name) const {
    auto const length = static_cast<int64_t>(row.size());
    if (length > prompt_slots_) {
        fail(SSD_INVALID_ARGUMENT, "the ", name, " is ", length, " tokens long, ", prompt_slots_,
             " fit: shorten it by ", length - prompt_slots_,
             " tokens or export with --prompt-slots ", length);
    }
    if (length < 3 || row.front() != control(bos).id || row.back() != control(begin_of_image).id) {
        fail(SSD_INVALID_ARGUMENT, "the ", name,
             " does not begin and end with the bundle's control tokens; make the ids with "
             "`ssd-export prompts`");
    }
    auto const bad = std::find_if(row.begin(), row.end(),
                                  [this](int32_t id) { return id < 0 || id >= vocabulary_size_; });
    if (bad != row.end()) {
        fail(SSD_INVALID_ARGUMENT, "the ", name, " has the token id ", *bad, ", and ids end at ",
             vocabulary_size_ - 1, "; make them with `ssd-export prompts`");
    }
}

// Its pads are attended; what pads a short row to the length of the batch is not.
std::vector<int32_t> TemplateEncoder::unconditional(size_t length) const {
    std::vector<int32_t> row(length, pad_id());
    row.front() = control(bos).id;
    row.back() = control(begin_of_image).id;
    return row;
}

int32_t TemplateEncoder::pad_id() const { return control(pad).id; }

}  // namespace ssd_runtime
