// Keys and values as a cache holds them: rows of float32, of float16, or of int8 with a scale each
// (ssd_export/cache/quantized_rows.py). For the sources that are compiled once for each instruction
// set.
#pragma once

#include "lanes.h"

namespace ssd_operators {
namespace {

struct Float32Rows {
    using Item = float;
    static constexpr bool has_scales = false;
    static constexpr float unit = 1;
    static Lanes load(float const* from) { return ssd_operators::load(from); }
    static void write(float const* row, int head_dim, float* to) {
        std::memcpy(to, row, sizeof(float) * static_cast<size_t>(head_dim));
    }
};

struct Float16Rows {
    using Item = uint16_t;
    static constexpr bool has_scales = false;
    static constexpr float unit = 1;
    static Lanes load(uint16_t const* from) { return load_float16(from); }
    static void write(float const* row, int head_dim, uint16_t* to) {
        for (int first = 0; first < head_dim; first += num_lanes) {
            Lanes lanes{};
            load_first(row + first, head_dim - first, lanes);
            uint16_t halves[num_lanes];
            store_float16(lanes, halves);
            int const left = head_dim - first < num_lanes ? head_dim - first : num_lanes;
            std::memcpy(to + first, halves, sizeof(uint16_t) * static_cast<size_t>(left));
        }
    }
};

struct Int8Rows {
    using Item = int8_t;
    static constexpr bool has_scales = true;
    static constexpr float greatest_code = 127, least_scale = 1e-30F;
    static constexpr float unit = 1 / greatest_code;  // of a code, beside the scale of its row
    static Lanes load(int8_t const* from) { return load_int8(from); }
    // The scale is the greatest magnitude of the row; NaN where a number is none.
    static void write(float const* row, int head_dim, int8_t* to, float* scale) {
        float greatest = 0, spoiled = 0;
        for (int i = 0; i < head_dim; ++i) {
            float const magnitude = row[i] < 0 ? -row[i] : row[i];
            greatest = magnitude > greatest ? magnitude : greatest;
            spoiled += row[i] * 0;
        }
        *scale = greatest + spoiled;
        float const factor = greatest_code / (greatest > least_scale ? greatest : least_scale);
        for (int i = 0; i < head_dim; ++i) {
            float const code = spoiled == 0 ? __builtin_rintf(row[i] * factor) : 0;
            to[i] = static_cast<int8_t>(code);
        }
    }
};

}  // namespace
}  // namespace ssd_operators
