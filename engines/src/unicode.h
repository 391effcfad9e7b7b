#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace ssd_runtime {

std::string utf8_of(uint32_t code_point);

// Text without the white space at its ends, by what Python's str.strip calls white space.
std::string_view trim_left(std::string_view text);
std::string_view trim_right(std::string_view text);
std::string_view trim(std::string_view text);

// Whether the text ends or begins with a letter, digit, mark or underscore (ASCII's alone; every
// character above it counts as one).
bool ends_with_word(std::string_view text);
bool begins_with_word(std::string_view text);

}  // namespace ssd_runtime
