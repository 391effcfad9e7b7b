#pragma once

#include <cstring>
#include <string>

namespace ssd_runtime {

// past_key_values.3.0.key, an input, and present.3.0.key, the output of the same cache tensor.
constexpr char past_prefix[] = "past_key_values.";
constexpr char present_prefix[] = "present.";

inline bool starts_with(std::string const& name, char const* begin) {
    return name.compare(0, std::strlen(begin), begin) == 0;
}

inline bool is_past(std::string const& name) { return starts_with(name, past_prefix); }
inline bool is_present(std::string const& name) { return starts_with(name, present_prefix); }

inline std::string present_of(std::string const& past) {
    return present_prefix + past.substr(std::strlen(past_prefix));
}
inline std::string past_of(std::string const& present) {
    return past_prefix + present.substr(std::strlen(present_prefix));
}

// key, value, key_scale, value_scale, position or score.
inline std::string kind_of(std::string const& cache) { return cache.substr(cache.rfind('.') + 1); }

}  // namespace ssd_runtime
