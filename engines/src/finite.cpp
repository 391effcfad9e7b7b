#include "finite.h"

#include <algorithm>
#include <cmath>

#include "failure.h"

namespace ssd_runtime {
namespace {

bool is_finite(float const* values, size_t count) {
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

char const* cause(Dtype dtype) {
    return dtype == Dtype::float16
               ? "this model's numbers do not fit float16 (65504 at most); export it again with "
                 "--dtype bf16 or --dtype fp32"
               : "the weights are damaged or the checkpoint's own are not finite; get the "
                 "checkpoint again and export it again";
}

}  // namespace

void check_logits(float const* logits, size_t count, int64_t step, Dtype dtype) {
    if (!is_finite(logits, count)) {
        fail(SSD_BAD_BUNDLE, "the logits of image token ", step, " are not finite: ", cause(dtype));
    }
}

void to_pixels(float const* levels, size_t count, Dtype dtype, uint8_t* pixels) {
    if (!is_finite(levels, count)) {
        fail(SSD_BAD_BUNDLE, "the pixels of an image are not finite: ", cause(dtype));
    }
    std::transform(levels, levels + count, pixels, [](float level) {
        return static_cast<uint8_t>(std::clamp(level, 0.0F, 255.0F));
    });
}

}  // namespace ssd_runtime
