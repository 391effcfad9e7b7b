// As many numbers at a time as a register of this instruction set holds, as the compiler's vector
// types. For the sources that are compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__F16C__)
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
using SignedByteLanes = int8_t __attribute__((vector_size(num_lanes)));
using ByteLanes = uint8_t __attribute__((vector_size(num_lanes)));

inline Lanes all(float value) { return Lanes{} + value; }

inline Lanes load(float const* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

inline void store(Lanes lanes, float* to) { std::memcpy(to, &lanes, sizeof(lanes)); }

// The first numbers, where fewer than a register holds are left; the others stay.
template <class Number, class Vector>
inline void load_first(Number const* from, int left, Vector& lanes) {
    if (left >= num_lanes) {
        std::memcpy(&lanes, from, sizeof(lanes));
    } else {
        Number part[num_lanes];
        std::memcpy(part, &lanes, sizeof(lanes));
        for (int i = 0; i < left; ++i) {
            part[i] = from[i];
        }
        std::memcpy(&lanes, part, sizeof(lanes));
    }
}

inline void store_first(Lanes lanes, int left, float* to) {
    if (left >= num_lanes) {
        store(lanes, to);
    } else {
        float part[num_lanes];
        store(lanes, part);
        for (int i = 0; i < left; ++i) {
            to[i] = part[i];
        }
    }
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

// float16 -> float32, exact.
#if defined(__AVX512F__)
inline Lanes load_float16(uint16_t const* from) {
    __m256i const halves = _mm256_loadu_si256(reinterpret_cast<__m256i const*>(from));
    return Lanes(_mm512_maskz_cvtph_ps(0xFFFF, halves));
}
#elif defined(__F16C__)
inline Lanes load_float16(uint16_t const* from) {
    return Lanes(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(from))));
}
#else
inline Lanes load_float16(uint16_t const* from) {
    ShortLanes halves;
    std::memcpy(&halves, from, sizeof(halves));
    IntLanes const bits = __builtin_convertvector(halves, IntLanes);
    IntLanes const magnitude = (bits & 0x7FFF) << 13;
    Lanes small;
    std::memcpy(&small, &magnitude, sizeof(small));
    small = small * 0x1p112F;
    IntLanes wide;
    std::memcpy(&wide, &small, sizeof(wide));
    wide = (bits & 0x7C00) == 0x7C00 ? (magnitude | 0x7F800000) : wide;  // infinity, NaN
    wide |= (bits & 0x8000) << 16;
    Lanes lanes;
    std::memcpy(&lanes, &wide, sizeof(lanes));
    return lanes;
}
#endif

// float32 -> the nearest float16, ties to even.
#if defined(__AVX512F__)
inline void store_float16(Lanes lanes, uint16_t* to) {
    __m256i const halves = _mm512_maskz_cvtps_ph(0xFFFF, __m512(lanes), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
#elif defined(__F16C__)
inline void store_float16(Lanes lanes, uint16_t* to) {
    __m128i const halves = _mm256_cvtps_ph(__m256(lanes), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
#else
inline void store_float16(Lanes lanes, uint16_t* to) {
    for (int i = 0; i < num_lanes; ++i) {
        float const x = lanes[i];
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof(bits));
        uint32_t const sign = bits >> 16U & 0x8000U;
        bits &= 0x7FFFFFFFU;
        uint32_t half;
        if (bits >= 0x47800000U) {  // beyond float16
            half = bits > 0x7F800000U ? 0x7E00U : 0x7C00U;
        } else if (bits < 0x38800000U) {  // subnormal: adding 1/2 rounds to its last place
            float magnitude;
            std::memcpy(&magnitude, &bits, sizeof(magnitude));
            magnitude += 0.5F;
            std::memcpy(&half, &magnitude, sizeof(half));
            half -= 0x3F000000U;
        } else {
            half = (bits + 0xC8000FFFU + (bits >> 13U & 1U)) >> 13U;
        }
        to[i] = static_cast<uint16_t>(half | sign);
    }
}
#endif

inline Lanes load_int8(int8_t const* from) {
#if defined(__AVX512F__)
    __m128i const codes = _mm_loadu_si128(reinterpret_cast<__m128i const*>(from));
    auto const whole = IntLanes(_mm512_maskz_cvtepi8_epi32(0xFFFF, codes));
#elif defined(__AVX2__)
    auto const whole =
        IntLanes(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<__m128i const*>(from))));
#else
    SignedByteLanes codes;
    std::memcpy(&codes, from, sizeof(codes));
    IntLanes const whole =
        __builtin_convertvector(__builtin_convertvector(codes, ShortLanes), IntLanes);
#endif
    return __builtin_convertvector(whole, Lanes);
}

// Writes first + i of each lane i that is not below the least; NaN is not. Returns how many;
// a whole register may be written.
inline int write_places_not_below(Lanes lanes, float least, int first, int32_t* to) {
#if defined(__AVX512F__)
    __m512i const places =
        _mm512_add_epi32(_mm512_set1_epi32(first),
                         _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    __mmask16 const kept = _mm512_cmp_ps_mask(__m512(lanes), _mm512_set1_ps(least), _CMP_NLT_UQ);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(kept, places));
    return __builtin_popcount(kept);
#else
    int found = 0;
    for (int i = 0; i < num_lanes; ++i) {
        to[found] = first + i;
        found += lanes[i] < least ? 0 : 1;
    }
    return found;
#endif
}

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

// exp(x) times 2^bits, to about one unit in the last place: where that is a normal number.
template <int bits>
inline Lanes scaled_exp(Lanes x) {
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
    IntLanes const exponent = (__builtin_convertvector(n, IntLanes) + (127 + bits)) << 23;
    Lanes scale;
    std::memcpy(&scale, &exponent, sizeof(scale));
    return p * scale;
}

// exp(x) for -87 <= x <= 87.
inline Lanes exp_of(Lanes x) { return scaled_exp<0>(x); }

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
