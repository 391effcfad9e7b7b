#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "ssd_runtime/ssd_runtime.h"

namespace ssd_runtime {

// What a caller is told: a status and one sentence that says what is wrong and what to do.
class Failure : public std::runtime_error {
public:
    Failure(ssd_status status, std::string const& message)
        : std::runtime_error(message), status_(status) {}

    ssd_status status() const { return status_; }

private:
    ssd_status status_;
};

// The parts, one after the other.
template <typename... Parts>
std::string text(Parts const&... parts) {
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

template <typename... Parts>
[[noreturn]] void fail(ssd_status status, Parts const&... parts) {
    throw Failure(status, text(parts...));
}

// "1.5 GiB", "12 MiB"
std::string gib(uint64_t num_bytes);

// What a user typed, in quotes, without line breaks, cut at 40 characters.
std::string in_quotes(std::string const& typed);

}  // namespace ssd_runtime
