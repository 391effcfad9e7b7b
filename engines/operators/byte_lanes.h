// Bytes in registers: what products of codes are made of. For a source that is compiled once for
// each instruction set.
//
// Four rows of bytes are interleaved, so that each lane of 32 bits holds four inputs of one output,
// and dot() adds their products to it. Codes count from their least: 0 to 15, 0 to 255.
#pragma once

#include "lanes.h"

namespace ssd_operators {
namespace {

#if defined(__AVX512F__)

using Bytes = __m512i;
constexpr bool has_many_registers = true;

inline Bytes bytes_at(void const* from) { return _mm512_loadu_si512(from); }
inline void store(Bytes x, void* to) { _mm512_storeu_si512(to, x); }
inline Bytes all_of(int32_t x) { return _mm512_set1_epi32(x); }
inline Lanes to_floats(Bytes x) { return __builtin_convertvector(IntLanes(x), Lanes); }

inline Bytes low_bytes(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes high_bytes(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes low_shorts(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes high_shorts(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }

inline Bytes low_codes(Bytes x) {
    constexpr int and_then_xor = 0x6A;
    return _mm512_ternarylogic_epi32(x, _mm512_set1_epi8(15), _mm512_set1_epi8(8), and_then_xor);
}
inline Bytes high_codes(Bytes x) { return low_codes(_mm512_srli_epi16(x, 4)); }
inline Bytes whole_codes(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }

template <int bits>
inline Bytes dot(Bytes sum, Bytes codes, Bytes inputs) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sum, codes, inputs);
#else
    auto const add = [&](Bytes to, Bytes some, short factor) {
        Bytes const pairs = _mm512_maddubs_epi16(some, inputs);
        return _mm512_add_epi32(to, _mm512_madd_epi16(pairs, _mm512_set1_epi16(factor)));
    };
    if (bits == 4) {
        return add(sum, codes, 1);
    }
    Bytes const nibble = _mm512_set1_epi8(15);  // products of all eight bits could saturate
    sum = add(sum, _mm512_and_si512(codes, nibble), 1);
    return add(sum, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble), 16);
#endif
}

#elif defined(__AVX2__)

using Bytes = __m256i;
constexpr bool has_many_registers = false;

inline Bytes bytes_at(void const* from) {
    return _mm256_loadu_si256(static_cast<__m256i const*>(from));
}
inline void store(Bytes x, void* to) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }
inline Bytes all_of(int32_t x) { return _mm256_set1_epi32(x); }
inline Lanes to_floats(Bytes x) { return __builtin_convertvector(IntLanes(x), Lanes); }

inline Bytes low_bytes(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes high_bytes(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes low_shorts(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
inline Bytes high_shorts(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }

inline Bytes low_codes(Bytes x) {
    return _mm256_xor_si256(_mm256_and_si256(x, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}
inline Bytes high_codes(Bytes x) { return low_codes(_mm256_srli_epi16(x, 4)); }
inline Bytes whole_codes(Bytes x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }

template <int bits>
inline Bytes dot(Bytes sum, Bytes codes, Bytes inputs) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, codes, inputs);
#else
    auto const add = [&](Bytes to, Bytes some, short factor) {
        Bytes const pairs = _mm256_maddubs_epi16(some, inputs);
        return _mm256_add_epi32(to, _mm256_madd_epi16(pairs, _mm256_set1_epi16(factor)));
    };
    if (bits == 4) {
        return add(sum, codes, 1);
    }
    Bytes const nibble = _mm256_set1_epi8(15);  // products of all eight bits could saturate
    sum = add(sum, _mm256_and_si256(codes, nibble), 1);
    return add(sum, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), 16);
#endif
}

#else

using Bytes = uint8_t __attribute__((vector_size(16)));
using Shorts = int16_t __attribute__((vector_size(16)));
using Words = int32_t __attribute__((vector_size(16)));
constexpr bool has_many_registers = false;

template <class Vector>
inline Vector vector_at(void const* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline Bytes bytes_at(void const* from) { return vector_at<Bytes>(from); }
inline void store(Bytes x, void* to) { std::memcpy(to, &x, sizeof x); }
inline Bytes all_of(int32_t x) { return Bytes(Words{} + x); }
inline Lanes to_floats(Bytes x) { return __builtin_convertvector(Words(x), Lanes); }

#if defined(__clang__)
#define SSD_SHUFFLED(a, b, type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SSD_SHUFFLED(a, b, type, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

inline Bytes low_bytes(Bytes a, Bytes b) {
    return SSD_SHUFFLED(a, b, Bytes, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Bytes high_bytes(Bytes a, Bytes b) {
    return SSD_SHUFFLED(a, b, Bytes, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Bytes low_shorts(Bytes a, Bytes b) {
    return Bytes(SSD_SHUFFLED(Shorts(a), Shorts(b), Shorts, 0, 8, 1, 9, 2, 10, 3, 11));
}
inline Bytes high_shorts(Bytes a, Bytes b) {
    return Bytes(SSD_SHUFFLED(Shorts(a), Shorts(b), Shorts, 4, 12, 5, 13, 6, 14, 7, 15));
}

inline Bytes low_codes(Bytes x) { return (x & 15) ^ 8; }
inline Bytes high_codes(Bytes x) { return (x >> 4) ^ 8; }
inline Bytes whole_codes(Bytes x) { return x ^ 128; }

template <int bits>
inline Bytes dot(Bytes sum, Bytes codes, Bytes inputs) {
    // 255 * 127 fits into 16 bits; pairs are added up in 32.
    auto const pairs = [](Bytes some, Bytes others) {
        Shorts const products = Shorts(some) * (Shorts(others) >> 8);
        return (Words(products) << 16 >> 16) + (Words(products) >> 16);
    };
    Bytes const zero{};
    Words const low = pairs(low_bytes(codes, zero), low_bytes(zero, inputs));
    Words const high = pairs(high_bytes(codes, zero), high_bytes(zero, inputs));
    Words const even = SSD_SHUFFLED(low, high, Words, 0, 2, 4, 6);
    Words const odd = SSD_SHUFFLED(low, high, Words, 1, 3, 5, 7);
    return Bytes(Words(sum) + even + odd);
}

#endif

inline void interleave(uint8_t const* from, int64_t stride, Bytes (&out)[4]) {
    Bytes const first = bytes_at(from), second = bytes_at(from + stride);
    Bytes const third = bytes_at(from + 2 * stride), fourth = bytes_at(from + 3 * stride);
    Bytes const a = low_bytes(first, second), b = high_bytes(first, second);
    Bytes const c = low_bytes(third, fourth), d = high_bytes(third, fourth);
    out[0] = low_shorts(a, c);
    out[1] = high_shorts(a, c);
    out[2] = low_shorts(b, d);
    out[3] = high_shorts(b, d);
}

}  // namespace
}  // namespace ssd_operators
