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

    int64_t padded(int columns) const {
        return (part.end_column - part.first_column + columns - 1) / columns * columns;
    }
    int8_t const* values(int64_t row) const {
        return rows.values + (row * codes.num_blocks() + block) * codes.block;
    }
    int64_t at(int64_t row) const { return row * codes.num_blocks() + block; }
};

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
    for (int i = 0; i < columns_of(bits); ++i) {
        out[i] = from[order<bits>.columns[i]];
    }
}

template <int bits>
inline Bytes first_sum(CodedRows const& rows, int64_t at) {
    return all_of(-(1 << (bits - 1)) * rows.sum[at]);
}

inline void add_scaled(float* sums, Bytes whole, float const* scale, float row_scale) {
    store(load(sums) + to_floats(whole) * (load(scale) * row_scale), sums);
}

// Adds a strip's products to those of the strips before it, and the last of a block to the sums.
template <int bits, int num_rows>
inline void multiply_strip(Place const& place, Strip const& strip, int64_t first_row, int input,
                           bool is_last, float const* scales) {
    constexpr int vectors = vectors_of(bits);
    int64_t const padded = place.padded(columns_of(bits));
    int64_t const offset = first_row * padded + place.column - place.part.first_column;
    int32_t* const whole = place.part.whole + offset;
    Bytes found[num_rows][vectors];
    int8_t const* values[num_rows];
    for (int row = 0; row < num_rows; ++row) {
        values[row] = place.values(first_row + row) + input;
        Bytes const start = first_sum<bits>(place.rows, place.at(first_row + row));
        for (int i = 0; i < vectors; ++i) {
            found[row][i] = input == 0 ? start : bytes_at(whole + row * padded + i * num_lanes);
        }
    }
    for (int four = 0; four < strip.num_fours; ++four) {
        for (int i = 4 * four; i < 4 * four + 4; ++i) {
            __builtin_prefetch(reinterpret_cast<void const*>(
                strip.ahead + static_cast<uintptr_t>(i * strip.ahead_stride)));
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
        float* const sums = place.part.sums + offset + row * padded;
        float const row_scale = place.rows.scale[place.at(first_row + row)];
        for (int i = 0; i < vectors; ++i) {
            if (is_last) {
                add_scaled(sums + i * num_lanes, found[row][i], scales + i * num_lanes, row_scale);
            } else {
                store(found[row][i], whole + row * padded + i * num_lanes);
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

// Few rows. Memory is asked for what stands a little further on in the same rows, and near their
// end for the beginning of the rows that follow. Short rows are one stream instead.
template <int bits>
void multiply_few(Codes const& codes, CodedRows const& rows, Part const& part) {
    constexpr int columns = columns_of(bits);
    int64_t const stride = codes.row_bytes();
    auto const start = reinterpret_cast<uintptr_t>(codes.codes);
    int64_t const first_byte = part.first_column * panel_bytes / columns;
    int64_t const end_byte =
        part.end_column == codes.width ? stride : part.end_column * panel_bytes / columns;
    bool const is_one_stream = end_byte - first_byte == stride && stride <= 2048;
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
            int64_t byte = first_byte;
            for (int64_t column = part.first_column; column < part.end_column; column += columns) {
                Place const place{codes, rows, part, block, column};
                Strip strip = strip_of(codes, first_input + input, some, column, edge);
                int64_t const later = byte + bytes_ahead;
                int64_t const ahead = is_one_stream      ? line + inputs_of_strip * (stride + byte)
                                      : later < end_byte ? line + later
                                                         : line + inputs_of_strip * stride +
                                                               first_byte + later - end_byte;
                strip.ahead = start + static_cast<uintptr_t>(ahead);
                strip.ahead_stride = is_one_stream ? panel_bytes : stride;
                byte += panel_bytes;
                if (is_last) {
                    order_scales<bits>(place, scales);
                }
                auto const begin = static_cast<int>(input);
                int64_t row = 0;
                for (; row + rows_of_strip <= rows.num_rows; row += rows_of_strip) {
                    multiply_strip<bits, rows_of_strip>(place, strip, row, begin, is_last, scales);
                }
                for (; row < rows.num_rows; ++row) {
                    multiply_strip<bits, 1>(place, strip, row, begin, is_last, scales);
                }
            }
        }
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
    int64_t const padded = place.padded(columns_of(bits));
    for (int row = 0; row < num_rows; ++row) {
        float* const sums = place.part.sums + (first_row + row) * padded + place.column -
                            place.part.first_column + first_vector * num_lanes;
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

template <int bits>
void multiply_many(Codes const& codes, CodedRows const& rows, Part const& part) {
    constexpr int columns = columns_of(bits), fours = most_of_block / 4;
    uint8_t edge[most_of_block * panel_bytes];
    Bytes unpacked[vectors_of(bits) * fours];
    float scales[columns];
    for (int64_t column = part.first_column; column < part.end_column; column += columns) {
        for (int64_t block = part.first_block; block < part.end_block; ++block) {
            Place const place{codes, rows, part, block, column};
            Strip const strip = strip_of(codes, block * codes.block, codes.block, column, edge);
            for (int four = 0; four < strip.num_fours; ++four) {
                uint8_t const* const from = strip.codes + 4 * four * strip.stride;
                auto const next = reinterpret_cast<uintptr_t>(from) +
                                  static_cast<uintptr_t>(codes.block * strip.stride);
                for (int i = 0; i < 4; ++i) {
                    __builtin_prefetch(reinterpret_cast<void const*>(
                        next + static_cast<uintptr_t>(i * strip.stride)));
                }
                Bytes mixed[4], wide[vectors_of(bits)];
                interleave(from, strip.stride, mixed);
                widen<bits>(mixed, wide);
                for (int i = 0; i < vectors_of(bits); ++i) {
                    unpacked[i * fours + four] = wide[i];
                }
            }
            order_scales<bits>(place, scales);
            multiply_tiles<bits, rows_of_tile>(place, unpacked, strip.num_fours, 0, scales);
        }
    }
}

template <int bits>
void gather_as(Part const* parts, int num_parts, int64_t row, float const* bias, float* out) {
    constexpr int columns = columns_of(bits);
    int64_t const first = parts[0].first_column, end = parts[0].end_column;
    int64_t const padded = (end - first + columns - 1) / columns * columns;
    for (int64_t column = first; column < end; column += columns) {
        float sums[columns], sorted[columns];
        for (int i = 0; i < columns; i += num_lanes) {
            int64_t const at = row * padded + column - first + i;
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

void code_row(float const* x, Codes const& codes, CodedRows const& rows, int64_t row) {
    int64_t const num_blocks = codes.num_blocks();
    for (int64_t block = 0; block < num_blocks; ++block) {
        int64_t const at = row * num_blocks + block, first = block * codes.block;
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

void gather_parts(int bits, Part const* parts, int num_parts, int64_t row, float const* bias,
                  float* out) {
    (bits == 4 ? gather_as<4> : gather_as<8>)(parts, num_parts, row, bias, out);
}

}  // namespace SSD_SET
}  // namespace ssd_operators
