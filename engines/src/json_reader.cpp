#include "json_reader.h"

namespace ssd_runtime {
namespace {

constexpr size_t deepest = 100;  // arrays and objects inside one another; a bundle's have ten

// Whether no value is nested deeper. What is no JSON may be either.
bool is_shallow(std::string_view content) {
    size_t depth = 0;
    bool is_text = false;
    for (size_t i = 0; i < content.size(); ++i) {
        char const byte = content[i];
        if (is_text && byte == '\\') {
            ++i;
        } else if (byte == '"') {
            is_text = !is_text;
        } else if (!is_text && (byte == '[' || byte == '{') && ++depth > deepest) {
            return false;
        } else if (!is_text && (byte == ']' || byte == '}') && depth > 0) {
            --depth;
        }
    }
    return true;
}

}  // namespace

nlohmann::ordered_json parse_json(std::string_view content) {
    if (!is_shallow(content)) {
        throw NotJson(text("nested deeper than ", deepest, " values"));
    }
    try {
        return nlohmann::ordered_json::parse(content);
    } catch (nlohmann::json::exception const& error) {
        throw NotJson(error.what());
    }
}

}  // namespace ssd_runtime
