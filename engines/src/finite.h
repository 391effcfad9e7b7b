#pragma once

#include <cstddef>
#include <cstdint>

#include "config.h"

namespace ssd_runtime {

// Checks that what a backend computes is finite: tokens and pixels of NaN look like any others.

// Throws Failure SSD_BAD_BUNDLE for logits of an image token that hold NaN or infinity.
void check_logits(float const* logits, size_t count, int64_t step, Dtype dtype);

// uint8 of levels 0 .. 255, truncated as Janus does. Throws Failure SSD_BAD_BUNDLE for NaN.
void to_pixels(float const* levels, size_t count, Dtype dtype, uint8_t* pixels);

}  // namespace ssd_runtime
