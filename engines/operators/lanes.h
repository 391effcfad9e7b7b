// As many numbers at a time as a register of this instruction set holds, as the compiler's vector
// types. For the sources that are compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ssd_operators {
namespace {

#if defined(__AVX512F__)
constexpr int num_lanes = 16;
#elif defined(__AVX2__)
constexpr int num_lanes = 8;
#else
constexpr int num_lanes = 4;
#endif
using Lanes = float __attribute__((vector_size(4 * num_lanes)));
using IntLanes = int32_t __attribute__((vector_size(4 * num_lanes)));
using ShortLanes = int16_t __attribute__((vector_size(2 * num_lanes)));
using ByteLanes = uint8_t __attribute__((vector_size(num_lanes)));

inline Lanes all(float value) { return Lanes{} + value; }

inline Lanes load(float const* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

// The compilers' conversions between bytes and floats take several times as many instructions.
// maskz: g++ 12 warns of the forms without.
#if defined(__AVX512F__)
inline Lanes load(uint8_t const* from) {
    __m128i const bytes = _mm_loadu_si128(reinterpret_cast<__m128i const*>(from));
    auto const whole = IntLanes(_mm512_maskz_cvtepu8_epi32(0xFFFF, bytes));
    return __builtin_convertvector(whole, Lanes);
}

inline void store(IntLanes whole, uint8_t* to) {
    __m128i const bytes = _mm512_maskz_cvtepi32_epi8(0xFFFF, __m512i(whole));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
#elif defined(__AVX2__)
inline Lanes load(uint8_t const* from) {
    __m128i const bytes = _mm_loadl_epi64(reinterpret_cast<__m128i const*>(from));
    return __builtin_convertvector(IntLanes(_mm256_cvtepu8_epi32(bytes)), Lanes);
}

inline void store(IntLanes whole, uint8_t* to) {
    __m128i const low = _mm256_castsi256_si128(__m256i(whole));
    __m128i const shorts = _mm_packus_epi32(low, _mm256_extracti128_si256(__m256i(whole), 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(shorts, shorts));
}
#else
inline Lanes load(uint8_t const* from) {
    ByteLanes bytes;
    std::memcpy(&bytes, from, sizeof(bytes));
    ShortLanes const wide = __builtin_convertvector(bytes, ShortLanes);
    return __builtin_convertvector(__builtin_convertvector(wide, IntLanes), Lanes);
}

inline void store(IntLanes whole, uint8_t* to) {
    ShortLanes const narrow = __builtin_convertvector(whole, ShortLanes);
    ByteLanes const bytes = __builtin_convertvector(narrow, ByteLanes);
    std::memcpy(to, &bytes, sizeof(bytes));
}
#endif

inline void store(Lanes lanes, float* to) { std::memcpy(to, &lanes, sizeof(lanes)); }

inline Lanes limited(Lanes x, float least, float greatest) {
    x = x > greatest ? all(greatest) : x;
    return x < least ? all(least) : x;
}

// The nearest of 0..255, ties to even; of NaN 0.
inline void store_rounded(Lanes x, uint8_t* to) {
    constexpr float magic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to whole numbers
    Lanes const whole = (limited(x, 0, 255) + magic) - magic;
    store(__builtin_convertvector(whole, IntLanes), to);
}

// exp(x) for -87 <= x <= 87, to about one unit in the last place.
inline Lanes exp_of(Lanes x) {
    constexpr float magic = 12582912.0F;
    Lanes const n = (x * 1.44269504F + magic) - magic;
    Lanes r = x - n * 0.693359375F;
    r = r + n * 2.12194440e-4F;
    Lanes p = all(1.9875691500e-4F);
    p = p * r + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * (r * r) + r + 1.0F;
    IntLanes const bits = (__builtin_convertvector(n, IntLanes) + 127) << 23;
    Lanes scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return p * scale;
}

// 1 / x for normal positive x, to about two units in the last place: three steps of Newton from a
// guess at its exponent, for less than a division.
inline Lanes inverse_of(Lanes x) {
    IntLanes bits;
    std::memcpy(&bits, &x, sizeof(bits));
    bits = 0x7EF311C7 - bits;
    Lanes guess;
    std::memcpy(&guess, &bits, sizeof(guess));
    for (int i = 0; i < 3; ++i) {
        guess = guess * (2.0F - x * guess);
    }
    return guess;
}

// x * sigmoid(x); NaN stays NaN.
inline Lanes silu(Lanes x) { return x * inverse_of(1.0F + exp_of(limited(-x, -87, 87))); }

}  // namespace
}  // namespace ssd_operators
