#include "conditions.h"

#include <algorithm>
#include <numeric>

#include <nlohmann/json.hpp>

#include "failure.h"
#include "json_reader.h"

namespace ssd_runtime {
namespace {

constexpr size_t max_digits = 9;

// Of ASCII's letters: the published lists of classes have no others.
std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(),
                   [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
    return text;
}

std::vector<std::string> class_names(std::string const& content, std::string const& path) {
    try {
        auto const parsed = parse_json(content);
        bool const says_some = parsed.is_object() && parsed.contains("class_names");
        return says_some ? parsed["class_names"].get<std::vector<std::string>>()
                         : std::vector<std::string>();
    } catch (NotJson const&) {
        fail(SSD_BAD_BUNDLE, path, " is not JSON: copy it again from where it came");
    } catch (nlohmann::json::exception const&) {
        fail(SSD_BAD_BUNDLE, path,
             ": class_names is no list of names: write a name for each class");
    }
}

}  // namespace

ClassEncoder::ClassEncoder(std::string const& content, std::string const& path, int64_t num_classes)
    : num_classes_(static_cast<int32_t>(num_classes)) {
    std::vector<std::string> const names = class_names(content, path);
    if (!names.empty() && names.size() != static_cast<size_t>(num_classes)) {
        fail(SSD_BAD_BUNDLE, path, ": class_names has ", names.size(),
             " names, and the weights have ", num_classes,
             " classes: write a name for each, or none");
    }
    for (std::string const& name : names) {
        numbers_.insert_or_assign(lower(name), static_cast<int32_t>(&name - names.data()));
    }
    first_name_ = names.empty() ? "" : lower(names.front());
}

std::vector<int32_t> ClassEncoder::encode(std::string const& text, std::string const& kind) const {
    auto const known = numbers_.find(lower(text));
    if (known != numbers_.end()) {
        return {known->second};
    }
    bool const is_number =
        text.size() <= max_digits && text.find_first_not_of("0123456789") == std::string::npos;
    if (!is_number) {
        fail(SSD_INVALID_ARGUMENT, in_quotes(text), " is no class of this model: ", way_out());
    }
    std::vector<int32_t> row{std::stoi(text)};
    check(row, kind);
    return row;
}

void ClassEncoder::check(std::vector<int32_t> const& row, std::string const& name) const {
    if (row.size() != 1) {
        fail(SSD_INVALID_ARGUMENT, "the ", name, " has ", row.size(),
             " ids, and a class is one number: ", way_out());
    }
    if (row.front() < 0 || row.front() >= num_classes_) {
        fail(SSD_INVALID_ARGUMENT, "class ", row.front(),
             row.front() < 0 ? " is no class of this model: " : " is beyond the model's last: ",
             way_out());
    }
}

std::vector<int32_t> ClassEncoder::unconditional(size_t /*length*/) const { return {num_classes_}; }

std::string ClassEncoder::way_out() const {
    std::string const numbers = text("give a number in 0 .. ", num_classes_ - 1);
    return first_name_.empty() ? numbers
                               : numbers + ", or a name such as " + in_quotes(first_name_);
}

std::string CaptionEncoder::why_no_text() const {
    return "this model reads captions as embeddings, not as text: give what its text encoder makes "
           "of them as embeddings";
}

std::vector<int32_t> CaptionEncoder::encode(std::string const& /*text*/,
                                            std::string const& kind) const {
    fail(SSD_INVALID_ARGUMENT,
         kind == "prompt" ? why_no_text()
                          : "this model has no text encoder for a " + kind + ": leave it out");
}

void CaptionEncoder::check(std::vector<int32_t> const& /*row*/, std::string const& name) const {
    fail(SSD_INVALID_ARGUMENT, "the ", name, " has ids: ", why_no_text());
}

std::vector<int32_t> CaptionEncoder::unconditional(size_t length) const {
    std::vector<int32_t> row(length);
    std::iota(row.begin(), row.end(), num_tokens_ - static_cast<int32_t>(length));
    return row;
}

}  // namespace ssd_runtime
