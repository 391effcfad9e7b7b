// exp for loops that compilers turn into vectors.
#pragma once

#include <cstdint>
#include <cstring>

namespace ssd_operators {
namespace {

// exp(x) for x <= 0, to about one unit in the last place, down to float32's least: among tokens
// that hardly anybody looks at, too, the least is evicted.
inline float exp_of(float x) {
    float const clamped = x < -104.0F ? -104.0F : x;
    auto const whole = static_cast<int32_t>(clamped * 1.44269504F - 0.5F);
    auto const n = static_cast<float>(whole);
    float r = clamped - n * 0.693359375F;
    r = r + n * 2.12194440e-4F;
    float p = 1.9875691500e-4F;
    p = p * r + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * r * r + r + 1.0F;
    int32_t const half = whole / 2;
    int32_t const bits[] = {(half + 127) * (1 << 23), (whole - half + 127) * (1 << 23)};
    float scales[2];
    std::memcpy(scales, bits, sizeof(scales));
    return p * scales[0] * scales[1];
}

}  // namespace
}  // namespace ssd_operators
