#include "step_operators.h"

#include "kernels.h"

namespace ssd_operators {
namespace {

class GatedSilu {
public:
    explicit GatedSilu(Ort::ConstKernelInfo const&) : kernels_(kernels()) {}

    void compute(Ort::KernelContext const& context) const {
        auto const gate_up = context.GetInput(0);
        auto shape = gate_up.GetTensorTypeAndShapeInfo().GetShape();
        if (shape.empty() || shape.back() % 2 != 0) {
            throw Ort::Exception("GatedSilu: rows of gates and their factors are expected",
                                 ORT_INVALID_ARGUMENT);
        }
        int64_t const size = shape.back() / 2;
        int64_t num_rows = 1;
        for (size_t i = 0; i + 1 < shape.size(); ++i) {
            num_rows *= shape[i];
        }
        shape.back() = size;
        float const* const in = gate_up.GetTensorData<float>();
        auto* const out =
            context.GetOutput(0, shape.data(), shape.size()).GetTensorMutableData<float>();
        parallel_for(context, num_rows, [&](int64_t row) {
            kernels_.gated_silu(in + row * 2 * size, size, out + row * size);
        });
    }

private:
    Kernels const& kernels_;
};

class DrawToken {
public:
    explicit DrawToken(Ort::ConstKernelInfo const&) : kernels_(kernels()) {}

    void compute(Ort::KernelContext const& context) const {
        auto const logits = context.GetInput(0), noise = context.GetInput(1);
        auto const shape = noise.GetTensorTypeAndShapeInfo().GetShape();
        auto const rows = logits.GetTensorTypeAndShapeInfo().GetShape();
        if (shape.size() != 3 || rows.size() != 2 || rows[1] != shape[2] ||
            (rows[0] != shape[1] && rows[0] != 2 * shape[1])) {
            throw Ort::Exception("DrawToken: noise of another shape than the logits",
                                 ORT_INVALID_ARGUMENT);
        }
        int64_t const images = shape[1], codes = shape[2];
        int64_t const step = context.GetInput(2).GetTensorData<int64_t>()[0];
        float const* const guided_by = context.GetInput(3).GetTensorData<float>();
        float const* const temperature = context.GetInput(4).GetTensorData<float>();
        float const* const of_step =
            noise.GetTensorData<float>() + step % shape[0] * images * codes;
        float const* const conditional = logits.GetTensorData<float>();
        bool const is_guided = rows[0] != images;
        float const* const unconditional = is_guided ? conditional + images * codes : nullptr;
        auto* const token = context.GetOutput(0, &images, 1).GetTensorMutableData<int32_t>();
        parallel_for(context, images, [&](int64_t image) {
            int64_t const at = image * codes;
            Race const race{conditional + at, is_guided ? unconditional + at : nullptr,
                            of_step + at, guided_by[image], temperature[image]};
            token[image] = static_cast<int32_t>(kernels_.draw(race, codes, scratch_of(codes)));
        });
    }

private:
    Kernels const& kernels_;
};

constexpr auto floats = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

struct GatedSiluOperator : CustomOperator<GatedSiluOperator, GatedSilu> {
    char const* GetName() const { return "GatedSilu"; }
    size_t GetInputTypeCount() const { return 1; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t) const { return floats; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return floats; }
};

struct DrawTokenOperator : CustomOperator<DrawTokenOperator, DrawToken> {
    char const* GetName() const { return "DrawToken"; }
    size_t GetInputTypeCount() const { return 5; }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetInputType(size_t index) const {
        return index == 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : floats;
    }
    ONNXTensorElementDataType GetOutputType(size_t) const {
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }
};

}  // namespace

OrtCustomOp const* gated_silu_operator() {
    static GatedSiluOperator const made;
    return &made;
}

OrtCustomOp const* draw_token_operator() {
    static DrawTokenOperator const made;
    return &made;
}

}  // namespace ssd_operators
