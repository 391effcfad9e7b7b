// Products of a few rows with a constant matrix, compiled once for each instruction set. A step of
// a few images reads its weights and does little else, so they are held in two bytes where these
// have every one of their bits, and widened in registers. Nothing of the standard library.
#include <cstring>

#include "kernels.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#define SSD_HAS_FLOAT16
#endif

namespace ssd_operators {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16, most_rows = 12;
#elif defined(__AVX2__)
constexpr int lanes = 8, most_rows = 6;
#else
constexpr int lanes = 4, most_rows = 4;
#endif
constexpr int columns = 2 * lanes;
constexpr int64_t few_rows = 2 * most_rows;  // more use a panel often enough to widen it once

typedef float Vector __attribute__((vector_size(4 * lanes)));
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));

struct Float32 {
    using Item = float;
    static Vector load(float const* from) {
        Vector vector;
        std::memcpy(&vector, from, sizeof vector);
        return vector;
    }
    static bool store(Vector vector, float* to) {
        std::memcpy(to, &vector, sizeof vector);
        return true;
    }
};

struct Bfloat16 {
    using Item = uint16_t;
    static Vector load(uint16_t const* from) {
        Halves halves;
        std::memcpy(&halves, from, sizeof halves);
        Words const words = __builtin_convertvector(halves, Words) << 16;
        Vector vector;
        std::memcpy(&vector, &words, sizeof vector);
        return vector;
    }
    static bool store(Vector vector, uint16_t* to) {
        Words words;
        std::memcpy(&words, &vector, sizeof words);
        Halves const halves = __builtin_convertvector(words >> 16, Halves);
        std::memcpy(to, &halves, sizeof halves);
        uint32_t lost = 0;
        for (int i = 0; i < lanes; ++i) {
            lost |= words[i] & 0xFFFFU;
        }
        return lost == 0;
    }
};

#if defined(SSD_HAS_FLOAT16)
struct Float16 {
#if defined(__AVX512F__)
    static constexpr __mmask16 every = 0xFFFF;  // gcc 12 warns about the forms without a mask
#endif
    using Item = uint16_t;
    static Vector load(uint16_t const* from) {
#if defined(__AVX512F__)
        return _mm512_maskz_cvtph_ps(every,
                                     _mm256_loadu_si256(reinterpret_cast<__m256i const*>(from)));
#else
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(from)));
#endif
    }
    static bool store(Vector vector, uint16_t* to) {
#if defined(__AVX512F__)
        __m256i const halves = _mm512_maskz_cvtps_ph(every, vector, _MM_FROUND_TO_NEAREST_INT);
#else
        __m128i const halves = _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT);
#endif
        std::memcpy(to, &halves, sizeof halves);
        Vector const widened = load(to);
        return std::memcmp(&widened, &vector, sizeof vector) == 0;
    }
};
#endif

// A panel is written row by row; the columns beyond the matrix are 0.
template <class Form>
bool pack_as(float const* matrix, int64_t depth, int64_t width, typename Form::Item* panels) {
    for (int64_t first = 0; first < width; first += columns) {
        int64_t const count = width - first < columns ? width - first : columns;
        for (int64_t k = 0; k < depth; ++k) {
            float row[columns] = {};
            std::memcpy(row, matrix + k * width + first,
                        sizeof(float) * static_cast<size_t>(count));
            for (int half = 0; half < 2; ++half) {
                if (!Form::store(Float32::load(row + half * lanes), panels)) {
                    return false;
                }
                panels += lanes;
            }
        }
    }
    return true;
}

// num_rows rows of x times a panel: what is summed stays in registers.
template <class Form, int num_rows>
void multiply_rows(Product const& product, int64_t depth, int64_t width, int64_t first_row,
                   int64_t first_column, typename Form::Item const* panel) {
    Vector sums[num_rows][2];
    for (int row = 0; row < num_rows; ++row) {
        sums[row][0] = sums[row][1] = Vector{};
    }
    float const* x = product.x + first_row * depth;
    for (int64_t k = 0; k < depth; ++k) {
        Vector const left = Form::load(panel), right = Form::load(panel + lanes);
        panel += columns;
        for (int row = 0; row < num_rows; ++row) {
            float const factor = x[row * depth + k];
            sums[row][0] += factor * left;
            sums[row][1] += factor * right;
        }
    }
    int64_t const count = width - first_column < columns ? width - first_column : columns;
    for (int row = 0; row < num_rows; ++row) {
        float out[columns];
        std::memcpy(out, sums[row], sizeof out);
        if (product.bias != nullptr) {
            for (int64_t i = 0; i < count; ++i) {
                out[i] += product.bias[first_column + i];
            }
        }
        std::memcpy(product.out + (first_row + row) * width + first_column, out,
                    sizeof(float) * static_cast<size_t>(count));
    }
}

// The rows from first_row on, as many as fit into the registers at once.
template <class Form, int num_rows>
void multiply_rest(Product const& product, int64_t depth, int64_t width, int64_t first_row,
                   int64_t first_column, typename Form::Item const* panel) {
    while (product.num_rows - first_row >= num_rows) {
        multiply_rows<Form, num_rows>(product, depth, width, first_row, first_column, panel);
        first_row += num_rows;
    }
    if constexpr (num_rows > 1) {
        constexpr int fewer = num_rows > 8 ? 8 : num_rows > 4 ? 4 : num_rows > 2 ? 2 : 1;
        multiply_rest<Form, fewer>(product, depth, width, first_row, first_column, panel);
    }
}

template <class Form>
void multiply_as(Product const& product, Panels const& panels, int64_t number, float* scratch) {
    auto const* panel =
        static_cast<typename Form::Item const*>(panels.weights) + number * panels.depth * columns;
    int64_t const column = number * columns;
    if (product.num_rows <= few_rows) {
        multiply_rest<Form, most_rows>(product, panels.depth, panels.width, 0, column, panel);
        return;
    }
    for (int64_t i = 0; i < panels.depth * columns; i += lanes) {
        Float32::store(Form::load(panel + i), scratch + i);
    }
    multiply_rest<Float32, most_rows>(product, panels.depth, panels.width, 0, column, scratch);
}

}  // namespace

namespace SSD_SET {

int64_t panel_columns() { return columns; }

bool pack(float const* matrix, Storage storage, int64_t depth, int64_t width, void* panels) {
    switch (storage) {
    case Storage::float32:
        return pack_as<Float32>(matrix, depth, width, static_cast<float*>(panels));
    case Storage::bfloat16:
        return pack_as<Bfloat16>(matrix, depth, width, static_cast<uint16_t*>(panels));
    case Storage::float16:
#if defined(SSD_HAS_FLOAT16)
        return pack_as<Float16>(matrix, depth, width, static_cast<uint16_t*>(panels));
#else
        return false;
#endif
    }
    return false;
}

void multiply(Product const& product, Panels const& panels, int64_t panel, float* scratch) {
    switch (panels.storage) {
    case Storage::float32: return multiply_as<Float32>(product, panels, panel, scratch);
    case Storage::bfloat16: return multiply_as<Bfloat16>(product, panels, panel, scratch);
    case Storage::float16:
#if defined(SSD_HAS_FLOAT16)
        return multiply_as<Float16>(product, panels, panel, scratch);
#else
        return;  // nothing is packed so
#endif
    }
}

}  // namespace SSD_SET
}  // namespace ssd_operators
