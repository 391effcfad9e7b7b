#pragma once

#include <cstdint>
#include <cstring>

namespace ssd_runtime {

inline float from_bits(uint32_t bits) {
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float from_bfloat16(uint16_t half) { return from_bits(uint32_t{half} << 16U); }

// IEEE binary16, subnormal numbers and infinities included; exact.
inline float from_float16(uint16_t half) {
    uint32_t const sign = uint32_t{half & 0x8000U} << 16U;
    uint32_t const exponent = half >> 10U & 0x1FU;
    uint32_t const mantissa = half & 0x3FFU;
    if (exponent == 0x1F) {
        return from_bits(sign | 0x7F800000U | mantissa << 13U);
    }
    if (exponent == 0) {
        float const value = static_cast<float>(mantissa) * 0x1p-24F;
        return sign != 0 ? -value : value;
    }
    return from_bits(sign | (exponent + 112) << 23U | mantissa << 13U);
}

}  // namespace ssd_runtime
