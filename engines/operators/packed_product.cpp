#include "packed_product.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../src/half.h"

#include "kernels.h"

namespace ssd_operators {
namespace {

class PackedMatMul {
public:
    explicit PackedMatMul(Ort::ConstKernelInfo const& info) : kernels_(kernels()) {
        int is_constant = 0;
        auto const matrix = info.GetTensorConstantInput(1, &is_constant);
        if (is_constant == 0) {
            throw Ort::Exception("PackedMatMul: its matrix is no constant", ORT_INVALID_GRAPH);
        }
        auto const shape = matrix.GetTensorTypeAndShapeInfo().GetShape();
        if (shape.size() != 2) {
            throw Ort::Exception("PackedMatMul: its matrix has other than two dimensions",
                                 ORT_INVALID_GRAPH);
        }
        panels_.depth = shape[0];
        panels_.width = shape[1];
        num_panels_ = (shape[1] + kernels_.columns - 1) / kernels_.columns;
        std::vector<float> widened;
        float const* const numbers = as_floats(matrix, widened);
        for (Storage const storage : {Storage::float16, Storage::bfloat16, Storage::float32}) {
            if (holds(numbers, storage)) {
                return;
            }
        }
        throw Ort::Exception("PackedMatMul: no form holds its matrix", ORT_FAIL);
    }

    void compute(Ort::KernelContext const& context) const {
        auto const x = context.GetInput(0);
        auto shape = x.GetTensorTypeAndShapeInfo().GetShape();
        if (shape.empty() || shape.back() != panels_.depth) {
            throw Ort::Exception("PackedMatMul: its rows have another width than its matrix",
                                 ORT_INVALID_ARGUMENT);
        }
        Product product{};
        product.num_rows = 1;
        for (size_t i = 0; i + 1 < shape.size(); ++i) {
            product.num_rows *= shape[i];
        }
        shape.back() = panels_.width;
        product.x = x.GetTensorData<float>();
        product.out =
            context.GetOutput(0, shape.data(), shape.size()).GetTensorMutableData<float>();
        product.bias =
            context.GetInputCount() > 2 ? context.GetInput(2).GetTensorData<float>() : nullptr;
        parallel_for(context, num_panels_, [&](int64_t panel) {
            kernels_.multiply(product, panels_, panel,
                              scratch_of(panels_.depth * kernels_.columns));
        });
    }

private:
    // The matrix in float32, which a form of two bytes is made of in either case.
    static float const* as_floats(Ort::ConstValue const& matrix, std::vector<float>& widened) {
        auto const info = matrix.GetTensorTypeAndShapeInfo();
        if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            return matrix.GetTensorData<float>();
        }
        if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
            throw Ort::Exception("PackedMatMul: its matrix is in other than float32 or float16",
                                 ORT_INVALID_GRAPH);
        }
        auto const* const halves = static_cast<uint16_t const*>(matrix.GetTensorRawData());
        widened.resize(info.GetElementCount());
        std::transform(halves, halves + widened.size(), widened.begin(), ssd_runtime::from_float16);
        return widened.data();
    }

    // Packs the matrix, unless this form loses a bit of it.
    bool holds(float const* matrix, Storage storage) {
        size_t const item = storage == Storage::float32 ? sizeof(float) : sizeof(uint16_t);
        auto const count = static_cast<size_t>(num_panels_ * kernels_.columns * panels_.depth);
        memory_ = std::make_unique<char[]>(count * item);
        panels_.weights = memory_.get();
        panels_.storage = storage;
        return kernels_.pack(matrix, storage, panels_.depth, panels_.width, memory_.get());
    }

    Kernels const& kernels_;
    Panels panels_{};
    int64_t num_panels_ = 0;
    std::unique_ptr<char[]> memory_;
};

struct Operator : CustomOperator<Operator, PackedMatMul> {
    char const* GetName() const { return "PackedMatMul"; }
    size_t GetInputTypeCount() const { return 3; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t index) const {
        return index == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED  // float32 or float16
                          : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
    ONNXTensorElementDataType GetOutputType(size_t) const {
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
        return index < 2 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }
};

}  // namespace

OrtCustomOp const* packed_product_operator() {
    static Operator const made;
    return &made;
}

}  // namespace ssd_operators
