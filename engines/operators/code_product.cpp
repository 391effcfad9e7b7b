// Products of rows in int8 with matrices in int4 or int8 (codes.h), compiled once for each
// instruction set. Nothing of the standard library.
//
// A panel is as many columns as the bytes of a register hold. Few rows are bound by memory: codes
// are read in strips of 32 inputs, panel after panel, so that the processor sees 32 streams, and
// multiplied as they come. Many rows are bound by arithmetic: a block of a panel is unpacked once
// for all of them. Sums are in the order in which interleaving leaves a panel's columns.
#include <cstring>

#include "byte_lanes.h"
#include "kernels.h"

namespace ssd_operators {
namespace {

constexpr int panel_bytes = 4 * num_lanes;
constexpr int inputs_of_strip = 32;
constexpr int64_t bytes_of_short_row = 2048;
constexpr int64_t bytes_ahead = 192;  // of a row, when they are asked of memory
constexpr int rows_of_strip = has_many_registers ? 2 : 1;
constexpr int rows_of_tile = has_many_registers ? 6 : 2, vectors_of_tile = 4;

constexpr int vectors_of(int bits) { return bits == 4 ? 8 : 4; }
constexpr int columns_of(int bits) { return vectors_of(bits) * num_lanes; }

// The columns of a panel, in the order of its sums.
template <int bits>
struct Order {
    uint8_t columns[columns_of(bits)];

    constexpr Order() : columns{} {
        constexpr int codes = bits == 4 ? 2 : 1;
        for (int vector = 0; vector < vectors_of(bits); ++vector) {
            for (int lane = 0; lane < num_lanes; ++lane) {
                int const byte = 16 * (lane / 4) + 4 * (vector / codes) + lane % 4;
                columns[vector * num_lanes + lane] =
                    static_cast<uint8_t>(codes * byte + vector % codes);
            }
        }
    }
};
template <int bits>
constexpr Order<bits> order{};

// Codes of some inputs of a panel, in rows that lie so many bytes apart.
struct Strip {
    uint8_t const* codes;
    int64_t stride;
    int num_fours;
    uintptr_t ahead;  // what will be read later, and how its rows lie
    int64_t ahead_stride;
};

template <int bits>
inline void widen(Bytes const (&four)[4], Bytes (&out)[vectors_of(bits)]) {
    for (int i = 0; i < 4; ++i) {
        if constexpr (bits == 4) {
            out[2 * i] = low_codes(four[i]);
            out[2 * i + 1] = high_codes(four[i]);
        } else {
            out[i] = whole_codes(four[i]);
        }
    }
}

inline Bytes four_inputs(int8_t const* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return all_of(four);
}

// What a block of a panel has in common for all rows.
struct Place {
    Codes const& codes;
    CodedRows const& rows;
    Part const& part;
    int64_t block, column;

    // Where the sums of a row of the panel begin.
    int64_t sums(int64_t row, int columns) const {
        return (column - part.first_column) * rows.num_rows + row * columns;
    }
    int8_t const* values(int64_t row) const {
        return rows.values + (block * rows.padded_rows() + row) * codes.block;
    }
    int64_t at(int64_t row) const { return block * rows.padded_rows() + row; }
};

#if defined(__AVX512F__)
template <int chosen>
inline __m512 quarters(__m512 a, __m512 b) {
    return _mm512_maskz_shuffle_f32x4(0xFFFF, a, b, chosen);  // g++ 12 warns of the form without
}
#endif

// A panel's numbers, in the order of its sums.
template <int bits>
inline void put_in_order(float const* from, float* out) {
#if defined(__AVX512F__)
    if constexpr (bits == 4) {
        for (int odd = 0; odd < 2; ++odd) {
            __m512i const chosen = _mm512_add_epi32(
                _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                all_of(odd));
            __m512 quarter[4];
            for (int i = 0; i < 4; ++i) {
                float const* const at = from + 2 * i * num_lanes;
                quarter[i] = _mm512_permutex2var_ps(load(at), chosen, load(at + num_lanes));
            }
            __m512 const a = quarters<0x44>(quarter[0], quarter[1]);
            __m512 const b = quarters<0x44>(quarter[2], quarter[3]);
            __m512 const c = quarters<0xEE>(quarter[0], quarter[1]);
            __m512 const d = quarters<0xEE>(quarter[2], quarter[3]);
            float* const to = out + odd * num_lanes;
            store(Lanes(quarters<0x88>(a, b)), to);
            store(Lanes(quarters<0xDD>(a, b)), to + 2 * num_lanes);
            store(Lanes(quarters<0x88>(c, d)), to + 4 * num_lanes);
            store(Lanes(quarters<0xDD>(c, d)), to + 6 * num_lanes);
        }
        return;
    }
#endif
    for (int i = 0; i < columns_of(bits); ++i) {
        out[i] = from[order<bits>.columns[i]];
    }
}

// The scales of a block's panel in the order of its sums; 0 beyond the last column.
template <int bits>
inline void order_scales(Place const& place, float* out) {
    Codes const& codes = place.codes;
    int64_t const row = codes.is_scaled_by_block ? place.block : 0;
    float const* from = codes.scale + row * codes.width + place.column;
    float edge[columns_of(bits)] = {};
    int64_t const count = codes.width - place.column;
    if (count < columns_of(bits)) {
        std::memcpy(edge, from, sizeof(float) * static_cast<size_t>(count));
        from = edge;
    }
    put_in_order<bits>(from, out);
}

template <int bits>
inline Bytes first_sum(CodedRows const& rows, int64_t at) {
    return all_of(-(1 << (bits - 1)) * rows.sum[at]);
}

inline void add_scaled(float* sums, Bytes whole, float const* scale, float row_scale) {
    store(load(sums) + to_floats(whole) * (load(scale) * row_scale), sums);
}

// Adds a strip's products to those of the strips before it, and the last of a block to the sums.
template <int bits, int num_rows, int locality>
inline void multiply_strip(Place const& place, Strip const& strip, int64_t first_row, int input,
                           bool is_last, float const* scales) {
    constexpr int vectors = vectors_of(bits);
    constexpr int columns = columns_of(bits);
    int64_t const offset = place.sums(first_row, columns);
    int32_t* const whole = place.part.whole + offset;
    Bytes found[num_rows][vectors];
    int8_t const* values[num_rows];
    for (int row = 0; row < num_rows; ++row) {
        values[row] = place.values(first_row + row) + input;
        Bytes const start = first_sum<bits>(place.rows, place.at(first_row + row));
        for (int i = 0; i < vectors; ++i) {
            found[row][i] = input == 0 ? start : bytes_at(whole + row * columns + i * num_lanes);
        }
    }
    for (int four = 0; four < strip.num_fours; ++four) {
        for (int i = 4 * four; i < 4 * four + 4; ++i) {
            auto const* const ahead = reinterpret_cast<void const*>(
                strip.ahead + static_cast<uintptr_t>(i * strip.ahead_stride));
            __builtin_prefetch(ahead, 0, locality);
        }
        Bytes mixed[4], wide[vectors];
        interleave(strip.codes + 4 * four * strip.stride, strip.stride, mixed);
        widen<bits>(mixed, wide);
        for (int row = 0; row < num_rows; ++row) {
            Bytes const inputs = four_inputs(values[row] + 4 * four);
            for (int i = 0; i < vectors; ++i) {
                found[row][i] = dot<bits>(found[row][i], wide[i], inputs);
            }
        }
    }
    for (int row = 0; row < num_rows; ++row) {
        float* const sums = place.part.sums + offset + row * columns;
        float const row_scale = place.rows.scale[place.at(first_row + row)];
        for (int i = 0; i < vectors; ++i) {
            if (is_last) {
                add_scaled(sums + i * num_lanes, found[row][i], scales + i * num_lanes, row_scale);
            } else {
                store(found[row][i], whole + row * columns + i * num_lanes);
            }
        }
    }
}

// The codes of some inputs of a panel; where they reach over an edge of the matrix, a copy with
// zeros beyond it.
inline Strip strip_of(Codes const& codes, int64_t first_input, int64_t num_inputs, int64_t column,
                      uint8_t* edge) {
    int64_t const byte = codes.bits == 4 ? column / 2 : column;
    int64_t const stride = codes.row_bytes();
    uint8_t const* const from = codes.codes + first_input * stride + byte;
    int64_t const inputs =
        codes.depth - first_input < num_inputs ? codes.depth - first_input : num_inputs;
    int64_t const bytes = stride - byte < panel_bytes ? stride - byte : panel_bytes;
    auto const num_fours = static_cast<int>((inputs + 3) / 4);
    if (bytes == panel_bytes && inputs % 4 == 0) {
        return {from, stride, num_fours, 0, 0};
    }
    std::memset(edge, 0, static_cast<size_t>(4 * num_fours * panel_bytes));
    for (int64_t input = 0; input < inputs; ++input) {
        std::memcpy(edge + input * panel_bytes, from + input * stride, static_cast<size_t>(bytes));
    }
    return {edge, panel_bytes, num_fours, 0, 0};
}

// The bytes of a row of codes that a part has.
struct Reach {
    int64_t stride, first_byte, end_byte;

    Reach(Codes const& codes, Part const& part, int columns)
        : stride(codes.row_bytes()),
          first_byte(part.first_column * panel_bytes / columns),
          end_byte(part.end_column == codes.width ? stride
                                                  : part.end_column * panel_bytes / columns) {}

    // What memory is asked for at a byte of a row: what stands a little further on in it, and near
    // its end the beginning of as many rows later.
    int64_t ahead(int64_t byte, int64_t num_inputs) const {
        int64_t const later = byte + bytes_ahead;
        return later < end_byte ? later : num_inputs * stride + first_byte + later - end_byte;
    }
};

// Few rows. Short ones of codes are one stream of memory.
template <int bits, bool is_one_stream>
void multiply_few(Codes const& codes, CodedRows const& rows, Part const& part) {
    constexpr int locality = is_one_stream ? 2 : 3;
    constexpr int columns = columns_of(bits);
    int64_t const stride = codes.row_bytes();
    auto const start = reinterpret_cast<uintptr_t>(codes.codes);
    Reach const reach(codes, part, columns);
    uint8_t edge[inputs_of_strip * panel_bytes];
    float scales[columns];
    for (int64_t block = part.first_block; block < part.end_block; ++block) {
        int64_t const first_input = block * codes.block;
        int64_t const left = codes.depth - first_input;
        int64_t const inputs = left < codes.block ? left : codes.block;
        for (int64_t input = 0; input < inputs; input += inputs_of_strip) {
            int64_t const some =
                inputs - input < inputs_of_strip ? inputs - input : inputs_of_strip;
            bool const is_last = input + some == inputs;
            int64_t const line = (first_input + input) * stride;
            int64_t byte = reach.first_byte;
            for (int64_t column = part.first_column; column < part.end_column; column += columns) {
                Place const place{codes, rows, part, block, column};
                Strip strip = strip_of(codes, first_input + input, some, column, edge);
                strip.ahead =
                    start + static_cast<uintptr_t>(is_one_stream
                                                       ? line + inputs_of_strip * (stride + byte)
                                                       : line + reach.ahead(byte, inputs_of_strip));
                strip.ahead_stride = is_one_stream ? panel_bytes : stride;
                byte += panel_bytes;
                if (is_last) {
                    order_scales<bits>(place, scales);
                }
                auto const begin = static_cast<int>(input);
                int64_t row = 0;
                for (; row + rows_of_strip <= rows.num_rows; row += rows_of_strip) {
                    multiply_strip<bits, rows_of_strip, locality>(place, strip, row, begin, is_last,
                                                                  scales);
                }
                for (; row < rows.num_rows; ++row) {
                    multiply_strip<bits, 1, locality>(place, strip, row, begin, is_last, scales);
                }
            }
        }
    }
}

template <int bits>
void multiply_few(Codes const& codes, CodedRows const& rows, Part const& part) {
    bool const is_whole = part.first_column == 0 && part.end_column == codes.width;
    if (is_whole && codes.row_bytes() <= bytes_of_short_row) {
        multiply_few<bits, true>(codes, rows, part);
    } else {
        multiply_few<bits, false>(codes, rows, part);
    }
}

// Some vectors of a block's panel times some rows. unpacked: [vectors of panel, most_of_block / 4].
template <int bits, int num_rows>
inline void multiply_tile(Place const& place, Bytes const* unpacked, int num_fours,
                          int64_t first_row, int first_vector, float const* scales) {
    constexpr int fours = most_of_block / 4;
    Bytes found[num_rows][vectors_of_tile];
    int8_t const* values[num_rows];
    for (int row = 0; row < num_rows; ++row) {
        values[row] = place.values(first_row + row);
        for (int i = 0; i < vectors_of_tile; ++i) {
            found[row][i] = first_sum<bits>(place.rows, place.at(first_row + row));
        }
    }
    for (int four = 0; four < num_fours; ++four) {
        Bytes codes[vectors_of_tile];
        for (int i = 0; i < vectors_of_tile; ++i) {
            codes[i] = unpacked[(first_vector + i) * fours + four];
        }
        for (int row = 0; row < num_rows; ++row) {
            Bytes const inputs = four_inputs(values[row] + 4 * four);
            for (int i = 0; i < vectors_of_tile; ++i) {
                found[row][i] = dot<bits>(found[row][i], codes[i], inputs);
            }
        }
    }
    for (int row = 0; row < num_rows; ++row) {
        float* const sums = place.part.sums + place.sums(first_row + row, columns_of(bits)) +
                            first_vector * num_lanes;
        float const row_scale = place.rows.scale[place.at(first_row + row)];
        for (int i = 0; i < vectors_of_tile; ++i) {
            add_scaled(sums + i * num_lanes, found[row][i], scales + (first_vector + i) * num_lanes,
                       row_scale);
        }
    }
}

// The rows from first_row on, as many at once as registers hold.
template <int bits, int num_rows>
inline void multiply_tiles(Place const& place, Bytes const* unpacked, int num_fours,
                           int64_t first_row, float const* scales) {
    for (; place.rows.num_rows - first_row >= num_rows; first_row += num_rows) {
        for (int vector = 0; vector < vectors_of(bits); vector += vectors_of_tile) {
            multiply_tile<bits, num_rows>(place, unpacked, num_fours, first_row, vector, scales);
        }
    }
    if constexpr (num_rows > 1) {
        multiply_tiles<bits, (num_rows > 4 ? 4 : num_rows / 2)>(place, unpacked, num_fours,
                                                                first_row, scales);
    }
}

#if defined(__AMX_INT8__)

// Tiles of 16 rows by 16 columns, which the processor multiplies as a whole. What the caller had
// made of its tiles is put back.
class Tiles {
public:
    explicit Tiles(Codes const& codes)
        : inputs_(static_cast<int>(codes.block < 64 ? codes.block : 64)) {
        is_meant(before_);
        _tile_storeconfig(&before_);
        is_meant(before_);
        Configuration made{};
        made.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            bool const is_codes = tile >= 6;
            made.bytes_of_row[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? inputs_ : 64);
            made.rows[tile] = static_cast<uint8_t>(is_codes ? inputs_ / 4 : 16);
        }
        is_meant(made);
        _tile_loadconfig(&made);
    }
    Tiles(Tiles const&) = delete;
    Tiles& operator=(Tiles const&) = delete;
    ~Tiles() {
        is_meant(before_);
        if (before_.palette != 0) {
            _tile_loadconfig(&before_);
        } else {
            _tile_release();
        }
    }

    template <int bits>
    void multiply(Place const& place, Bytes const* unpacked, int, float const* scales) const {
        constexpr int fours = most_of_block / 4;
        int64_t const stride = place.codes.block;
        for (int64_t row = 0; row < place.rows.num_rows; row += 32) {
            bool const has_both = place.rows.num_rows - row > 16;
            int8_t const* const values = place.values(row);
            for (int vector = 0; vector < vectors_of(bits); vector += 2) {
                alignas(64) int32_t found[4][16 * 16];
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t input = 0; input < place.codes.block; input += inputs_) {
                    Bytes const* const left = unpacked + vector * fours + input / 4;
                    _tile_loadd(6, left, 64);
                    _tile_loadd(7, left + fours, 64);
                    _tile_loadd(4, values + input, stride);
                    _tile_dpbsud(0, 4, 6);
                    _tile_dpbsud(1, 4, 7);
                    if (has_both) {
                        _tile_loadd(5, values + 16 * stride + input, stride);
                        _tile_dpbsud(2, 5, 6);
                        _tile_dpbsud(3, 5, 7);
                    }
                }
                _tile_stored(0, found[0], 64);
                _tile_stored(1, found[1], 64);
                add<bits>(place, found[0], found[1], row, vector, scales);
                if (has_both) {
                    _tile_stored(2, found[2], 64);
                    _tile_stored(3, found[3], 64);
                    add<bits>(place, found[2], found[3], row + 16, vector, scales);
                }
            }
        }
    }

private:
    struct alignas(64) Configuration {
        uint8_t palette, start_row;
        uint8_t reserved[14];
        uint16_t bytes_of_row[16];
        uint8_t rows[16];
    };

    // g++ 12 takes it that only the first bytes of a configuration are read or written.
    static void is_meant(Configuration& configuration) {
        asm volatile("" : : "r"(&configuration) : "memory");
    }

    // Adds two tiles' products to the sums of their rows.
    template <int bits>
    static void add(Place const& place, int32_t const* left, int32_t const* right,
                    int64_t first_row, int vector, float const* scales) {
        int64_t const left_rows = place.rows.num_rows - first_row;
        for (int row = 0; row < 16 && row < left_rows; ++row) {
            int64_t const at = place.at(first_row + row);
            Bytes const start = first_sum<bits>(place.rows, at);
            float const row_scale = place.rows.scale[at];
            float* const sums = place.part.sums + place.sums(first_row + row, columns_of(bits)) +
                                vector * num_lanes;
            float const* const own = scales + vector * num_lanes;
            add_scaled(sums, _mm512_add_epi32(bytes_at(left + 16 * row), start), own, row_scale);
            add_scaled(sums + num_lanes, _mm512_add_epi32(bytes_at(right + 16 * row), start),
                       own + num_lanes, row_scale);
        }
    }

    int inputs_;
    Configuration before_;
};

#else

struct Tiles {
    explicit Tiles(Codes const&) {}

    template <int bits>
    void multiply(Place const& place, Bytes const* unpacked, int num_fours,
                  float const* scales) const {
        multiply_tiles<bits, rows_of_tile>(place, unpacked, num_fours, 0, scales);
    }
};

#endif

// A block of a panel's codes as dot() takes them: [vectors of panel, most_of_block / 4].
template <int bits>
inline void unpack(Strip const& strip, Bytes* unpacked) {
    for (int four = 0; four < strip.num_fours; ++four) {
        for (int i = 4 * four; i < 4 * four + 4; ++i) {
            __builtin_prefetch(reinterpret_cast<void const*>(
                strip.ahead + static_cast<uintptr_t>(i * strip.ahead_stride)));
        }
        Bytes mixed[4], wide[vectors_of(bits)];
        interleave(strip.codes + 4 * four * strip.stride, strip.stride, mixed);
        widen<bits>(mixed, wide);
        for (int i = 0; i < vectors_of(bits); ++i) {
            unpacked[i * (most_of_block / 4) + four] = wide[i];
        }
    }
}

template <int bits>
void multiply_many(Codes const& codes, CodedRows const& rows, Part const& part) {
    constexpr int columns = columns_of(bits);
    Reach const reach(codes, part, columns);
    Tiles const tiles(codes);
    uint8_t edge[most_of_block * panel_bytes];
    alignas(64) Bytes unpacked[vectors_of(bits) * (most_of_block / 4)] = {};
    float scales[columns];
    for (int64_t block = part.first_block; block < part.end_block; ++block) {
        int64_t const input = block * codes.block;
        int64_t byte = reach.first_byte;
        for (int64_t column = part.first_column; column < part.end_column; column += columns) {
            Place const place{codes, rows, part, block, column};
            Strip strip = strip_of(codes, input, codes.block, column, edge);
            strip.ahead =
                reinterpret_cast<uintptr_t>(codes.codes) +
                static_cast<uintptr_t>(input * reach.stride + reach.ahead(byte, codes.block));
            strip.ahead_stride = reach.stride;
            byte += panel_bytes;
            unpack<bits>(strip, unpacked);
            order_scales<bits>(place, scales);
            tiles.multiply<bits>(place, unpacked, strip.num_fours, scales);
        }
    }
}

template <int bits>
void gather_as(Part const* parts, int num_parts, int64_t num_rows, int64_t row, float const* bias,
               float* out) {
    constexpr int columns = columns_of(bits);
    int64_t const first = parts[0].first_column, end = parts[0].end_column;
    for (int64_t column = first; column < end; column += columns) {
        float sums[columns], sorted[columns];
        for (int i = 0; i < columns; i += num_lanes) {
            int64_t const at = (column - first) * num_rows + row * columns + i;
            Lanes sum = load(parts[0].sums + at);
            for (int part = 1; part < num_parts; ++part) {
                sum += load(parts[part].sums + at);
            }
            store(sum, sums + i);
        }
        for (int i = 0; i < columns; ++i) {
            sorted[order<bits>.columns[i]] = sums[i];
        }
        int64_t const count = end - column < columns ? end - column : columns;
        for (int64_t i = 0; bias != nullptr && i < count; ++i) {
            sorted[i] += bias[column + i];
        }
        std::memcpy(out + column, sorted, sizeof(float) * static_cast<size_t>(count));
    }
}

// A block of numbers as int8: (their scale, the sum of the codes). What is less than a normal
// number's part of 127 counts as 0, and what is no number makes the scale none.
inline float code_block(float const* x, int64_t count, int8_t* values, int32_t* sum) {
    float greatest = 0, spoiled = 0;
#pragma omp simd reduction(max : greatest) reduction(+ : spoiled)
    for (int64_t i = 0; i < count; ++i) {
        float const magnitude = x[i] < 0 ? -x[i] : x[i];
        greatest = magnitude > greatest ? magnitude : greatest;
        spoiled += x[i] * 0;  // NaN of infinity and NaN
    }
    *sum = 0;
    if (spoiled != 0 || greatest < 1e-35F) {
        std::memset(values, 0, static_cast<size_t>(count));
        return spoiled;
    }
    float const inverse = 127 / greatest;
    constexpr float magic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to whole numbers
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) {
        auto const code = static_cast<int32_t>((x[i] * inverse + magic) - magic);
        values[i] = static_cast<int8_t>(code);
        total += code;
    }
    *sum = total;
    return greatest / 127;
}

}  // namespace

namespace SSD_SET {

int panel_of(int bits) { return columns_of(bits); }

int few_rows() {
#if defined(__AMX_INT8__)
    return 8;
#else
    return has_many_registers ? 16 : 4;
#endif
}

void code_row(float const* x, Codes const& codes, CodedRows const& rows, int64_t row) {
    int64_t const num_blocks = codes.num_blocks();
    for (int64_t block = 0; block < num_blocks; ++block) {
        int64_t const at = block * rows.padded_rows() + row, first = block * codes.block;
        int64_t const count = codes.depth - first < codes.block ? codes.depth - first : codes.block;
        int8_t* const values = rows.values + at * codes.block;
        std::memset(values + count, 0, static_cast<size_t>(codes.block - count));
        rows.scale[at] = code_block(x + first, count, values, rows.sum + at);
    }
}

void multiply_codes(Codes const& codes, CodedRows const& rows, Part const& part, bool are_few) {
    if (codes.bits == 4) {
        (are_few ? multiply_few<4> : multiply_many<4>)(codes, rows, part);
    } else {
        (are_few ? multiply_few<8> : multiply_many<8>)(codes, rows, part);
    }
}

void gather_parts(int bits, Part const* parts, int num_parts, int64_t num_rows, int64_t row,
                  float const* bias, float* out) {
    (bits == 4 ? gather_as<4> : gather_as<8>)(parts, num_parts, num_rows, row, bias, out);
}

}  // namespace SSD_SET
}  // namespace ssd_operators
