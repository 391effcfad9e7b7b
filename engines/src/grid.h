#pragma once

#include <cstdint>

namespace ssd_runtime {

// The image tokens of one image, generated row by row from the upper left.
struct Grid {
    int64_t height, width;

    int64_t num_tokens() const { return height * width; }
};

}  // namespace ssd_runtime
