#include "quantized_product.h"

#include <algorithm>

#include "kernels.h"

namespace ssd_operators {
namespace {

constexpr int64_t most_rows = 128;          // at once, so that their sums stay in the cache
constexpr int64_t most_sums = 1 << 18;      // of a part, for the same reason
constexpr int64_t bytes_of_part = 1 << 20;  // of codes: what is worth a part

int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }

class QuantizedMatMul {
public:
    explicit QuantizedMatMul(Ort::ConstKernelInfo const& info) : kernels_(kernels()) {
        auto const bits = info.GetAttribute<int64_t>("bits");
        auto const block = info.GetAttribute<int64_t>("block");
        need(bits == 4 || bits == 8, "bits are not 4 or 8", ORT_INVALID_GRAPH);
        need(block >= 0 && block <= most_of_block && block % 16 == 0,
             "a block is not of 16 to 128 inputs", ORT_INVALID_GRAPH);
        codes_.bits = static_cast<int>(bits);
        codes_.is_scaled_by_block = block != 0;
        codes_.block = block != 0 ? block : most_of_block;
    }

    void compute(Ort::KernelContext const& context) const {
        auto const x = context.GetInput(0);
        auto shape = x.GetTensorTypeAndShapeInfo().GetShape();
        Codes const codes = codes_of(context);
        need(!shape.empty() && shape.back() == codes.depth,
             "its rows have another width than its matrix");
        int64_t num_rows = 1;
        for (size_t i = 0; i + 1 < shape.size(); ++i) {
            num_rows *= shape[i];
        }
        shape.back() = codes.width;
        float* const out =
            context.GetOutput(0, shape.data(), shape.size()).GetTensorMutableData<float>();
        float const* const bias =
            context.GetInputCount() > 3 ? context.GetInput(3).GetTensorData<float>() : nullptr;
        float const* const in = x.GetTensorData<float>();
        for (int64_t row = 0; row < num_rows && codes.width > 0; row += most_rows) {
            multiply(context, codes, in + row * codes.depth, std::min(most_rows, num_rows - row),
                     bias, out + row * codes.width);
        }
    }

private:
    static void need(bool holds, char const* otherwise, OrtErrorCode code = ORT_INVALID_ARGUMENT) {
        if (!holds) {
            throw Ort::Exception(std::string("QuantizedMatMul: ") + otherwise, code);
        }
    }

    Codes codes_of(Ort::KernelContext const& context) const {
        auto const matrix = context.GetInput(1), scale = context.GetInput(2);
        auto const info = matrix.GetTensorTypeAndShapeInfo();
        auto const type = codes_.bits == 4 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                                           : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
        need(info.GetElementType() == type, "its codes are of another type");
        auto const shape = info.GetShape();
        need(shape.size() == 2, "its matrix has other than two dimensions");
        Codes codes = codes_;
        codes.codes = static_cast<uint8_t const*>(matrix.GetTensorRawData());
        codes.depth = shape[0];
        codes.width = codes.bits == 4 ? 2 * shape[1] : shape[1];
        int64_t const scales = codes.is_scaled_by_block ? codes.num_blocks() : 1;
        need(!codes.is_scaled_by_block || codes.depth % codes.block == 0,
             "its blocks do not divide its inputs");
        need(scale.GetTensorTypeAndShapeInfo().GetElementCount() ==
                 static_cast<size_t>(scales * codes.width),
             "it has not one scale a block and output");
        codes.scale = scale.GetTensorData<float>();
        return codes;
    }

    // Rows in int8, in memory of the calling thread.
    CodedRows rows_of(Codes const& codes, float const* x, int64_t num_rows,
                      Ort::KernelContext const& context) const {
        CodedRows rows{};
        rows.num_rows = num_rows;
        int64_t const count = rows.padded_rows() * codes.num_blocks();
        thread_local std::vector<int32_t> memory;
        auto const words = static_cast<size_t>(count * (2 + codes.block / 4));
        if (memory.size() < words) {
            memory.resize(words);
        }
        rows.sum = memory.data();
        rows.scale = reinterpret_cast<float*>(memory.data() + count);
        rows.values = reinterpret_cast<int8_t*>(memory.data() + 2 * count);
        for_rows(context, num_rows,
                 [&](int64_t row) { kernels_.code_row(x + row * codes.depth, codes, rows, row); });
        return rows;
    }

    // The parts of a product, which threads share: of few rows blocks of inputs, so that each reads
    // memory in one stream; of many columns as well. They do not depend on the threads, and neither
    // does a sum.
    std::vector<Part> parts(Codes const& codes, int64_t num_rows) const {
        int64_t const panel = kernels_.panel_of(codes.bits);
        int64_t const columns =
            parts_of(std::min(codes.width, std::max(most_sums / num_rows, panel)), panel) * panel;
        int64_t const most = num_rows <= 2 ? 8 : 4;
        int64_t const wanted = std::min(codes.row_bytes() * codes.depth / bytes_of_part, most) /
                               parts_of(codes.width, columns);
        int64_t const deep = std::clamp<int64_t>(wanted, 1, codes.num_blocks());
        int64_t const blocks = parts_of(codes.num_blocks(), deep);
        std::vector<Part> made;
        for (int64_t column = 0; column < codes.width; column += columns) {
            for (int64_t block = 0; block < codes.num_blocks(); block += blocks) {
                made.push_back({block, std::min(block + blocks, codes.num_blocks()), column,
                                std::min(column + columns, codes.width), nullptr, nullptr});
            }
        }
        return made;
    }

    void multiply(Ort::KernelContext const& context, Codes const& codes, float const* x,
                  int64_t num_rows, float const* bias, float* out) const {
        CodedRows const rows = rows_of(codes, x, num_rows, context);
        int64_t const panel = kernels_.panel_of(codes.bits);
        auto const size_of = [&](Part const& part) {
            return num_rows * parts_of(part.end_column - part.first_column, panel) * panel;
        };
        std::vector<Part> made = parts(codes, num_rows);
        int64_t total = 0;
        for (Part const& part : made) {
            total += size_of(part);
        }
        float* sums = scratch_of(total);
        for (Part& part : made) {
            part.sums = sums;
            sums += size_of(part);
        }
        parallel_for(context, static_cast<int64_t>(made.size()), [&](int64_t number) {
            thread_local std::vector<int32_t> whole;
            Part& part = made[static_cast<size_t>(number)];
            auto const size = static_cast<size_t>(size_of(part));
            std::fill_n(part.sums, size, 0.0F);
            bool const are_few = num_rows <= kernels_.few_rows;
            if (are_few && whole.size() < size) {
                whole.resize(size);
            }
            part.whole = whole.data();
            kernels_.multiply_codes(codes, rows, part, are_few);
        });
        gather(context, codes, made, num_rows, bias, out);
    }

    // Adds up parts of the same columns, which follow each other.
    void gather(Ort::KernelContext const& context, Codes const& codes,
                std::vector<Part> const& made, int64_t num_rows, float const* bias,
                float* out) const {
        auto const of_row = [&](int64_t row) {
            for (size_t first = 0; first < made.size();) {
                size_t end = first;
                while (end < made.size() && made[end].first_column == made[first].first_column) {
                    ++end;
                }
                kernels_.gather_parts(codes.bits, &made[first], static_cast<int>(end - first),
                                      num_rows, row, bias, out + row * codes.width);
                first = end;
            }
        };
        for_rows(context, num_rows, of_row);
    }

    // Calls work(row); few rows are not worth another thread.
    template <class Work>
    void for_rows(Ort::KernelContext const& context, int64_t num_rows, Work const& work) const {
        if (num_rows > kernels_.few_rows) {
            parallel_for(context, num_rows, work);
            return;
        }
        for (int64_t row = 0; row < num_rows; ++row) {
            work(row);
        }
    }

    Kernels const& kernels_;
    Codes codes_{};
};

struct Operator : CustomOperator<Operator, QuantizedMatMul> {
    char const* GetName() const { return "QuantizedMatMul"; }
    size_t GetInputTypeCount() const { return 4; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t index) const {
        return index == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED
                          : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
    ONNXTensorElementDataType GetOutputType(size_t) const {
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
        return index < 3 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }
};

}  // namespace

OrtCustomOp const* quantized_product_operator() {
    static Operator const made;
    return &made;
}

}  // namespace ssd_operators
