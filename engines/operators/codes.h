// Matrices in int4 and int8 as the weights file holds them (ssd_export/model/quantization.py), and
// rows rounded to int8 to be multiplied with them.
#pragma once

#include <cstdint>

namespace ssd_operators {

// codes [depth, width], two of int4 in a byte; scale [depth / block, width], or [width] where every
// input of an output shares it.
struct Codes {
    uint8_t const* codes;
    float const* scale;
    int bits;
    int64_t depth, width;
    int64_t block;  // inputs that are rounded with one scale: those of a weight's, at most 128
    bool is_scaled_by_block;

    int64_t num_blocks() const { return (depth + block - 1) / block; }
    int64_t row_bytes() const { return bits == 4 ? width / 2 : width; }
};
constexpr int64_t most_of_block = 128;

// values [num_blocks, padded rows, block], the last block filled up with zeros, which scale
// [num_blocks, padded rows] turns back into numbers; sum, as many, of a block's values. What rows
// are padded with is read, but nothing comes of it.
struct CodedRows {
    int8_t* values;
    float* scale;
    int32_t* sum;
    int64_t num_rows;

    int64_t padded_rows() const { return (num_rows + 15) / 16 * 16; }
};

// What is multiplied at once: blocks of inputs by columns of outputs, which begin with a panel.
// sums: float [panels, num_rows, columns of a panel] in the order of the kernels' panels, zero
// before; whole: int32, as many, of any value.
struct Part {
    int64_t first_block, end_block, first_column, end_column;
    float* sums;
    int32_t* whole;
};

}  // namespace ssd_operators
