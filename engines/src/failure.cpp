#include "failure.h"

#include <algorithm>
#include <cstdio>

namespace ssd_runtime {

std::string gib(uint64_t num_bytes) {
    if (num_bytes < (uint64_t{1} << 30)) {
        return text(std::max<uint64_t>(1, num_bytes >> 20), " MiB");
    }
    char number[32];
    std::snprintf(number, sizeof number, "%.1f GiB",
                  static_cast<double>(num_bytes) / static_cast<double>(uint64_t{1} << 30));
    return number;
}

std::string in_quotes(std::string const& typed) {
    std::string shown;
    size_t characters = 0;
    for (char const byte : typed) {
        bool const begins_character = (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U;
        if (begins_character && ++characters > 40) {
            shown += "...";
            break;
        }
        bool const is_control = static_cast<unsigned char>(byte) < 0x20U || byte == 0x7F;
        shown += is_control ? ' ' : byte;
    }
    return "'" + shown + "'";
}

}  // namespace ssd_runtime
