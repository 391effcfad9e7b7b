#include "unicode.h"

#include <algorithm>
#include <iterator>

namespace ssd_runtime {
namespace {

constexpr uint32_t white_space[] = {0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000};

bool is_white_space(uint32_t code) {
    return (code >= 0x09 && code <= 0x0D) || (code >= 0x1C && code <= 0x20) ||
           (code >= 0x2000 && code <= 0x200A) ||
           std::find(std::begin(white_space), std::end(white_space), code) != std::end(white_space);
}

bool is_continuation(char byte) { return (static_cast<unsigned char>(byte) & 0xC0U) == 0x80U; }

// The code point of valid UTF-8 that is one character long.
uint32_t code_point(std::string_view character) {
    auto const first = static_cast<unsigned char>(character[0]);
    uint32_t code = character.size() == 1   ? first
                    : character.size() == 2 ? first & 0x1FU
                    : character.size() == 3 ? first & 0x0FU
                                            : first & 0x07U;
    for (size_t i = 1; i < character.size(); ++i) {
        code = code << 6U | (static_cast<unsigned char>(character[i]) & 0x3FU);
    }
    return code;
}

size_t first_size(std::string_view text) {
    size_t size = 1;
    while (size < text.size() && is_continuation(text[size])) {
        ++size;
    }
    return size;
}

size_t last_size(std::string_view text) {
    size_t size = 1;
    while (size < text.size() && is_continuation(text[text.size() - size])) {
        ++size;
    }
    return size;
}

bool is_word(char byte) {
    auto const code = static_cast<unsigned char>(byte);
    return code >= 0x80 || (code >= '0' && code <= '9') || (code >= 'A' && code <= 'Z') ||
           (code >= 'a' && code <= 'z') || code == '_';
}

}  // namespace

std::string utf8_of(uint32_t code) {
    auto const byte = [](uint32_t value) { return static_cast<char>(value); };
    if (code < 0x80) {
        return {byte(code)};
    }
    if (code < 0x800) {
        return {byte(0xC0U | code >> 6U), byte(0x80U | (code & 0x3FU))};
    }
    return {byte(0xE0U | code >> 12U), byte(0x80U | (code >> 6U & 0x3FU)),
            byte(0x80U | (code & 0x3FU))};
}

std::string_view trim_left(std::string_view text) {
    while (!text.empty() && is_white_space(code_point(text.substr(0, first_size(text))))) {
        text.remove_prefix(first_size(text));
    }
    return text;
}

std::string_view trim_right(std::string_view text) {
    while (!text.empty() &&
           is_white_space(code_point(text.substr(text.size() - last_size(text))))) {
        text.remove_suffix(last_size(text));
    }
    return text;
}

std::string_view trim(std::string_view text) { return trim_left(trim_right(text)); }

bool ends_with_word(std::string_view text) { return !text.empty() && is_word(text.back()); }

bool begins_with_word(std::string_view text) { return !text.empty() && is_word(text.front()); }

}  // namespace ssd_runtime
