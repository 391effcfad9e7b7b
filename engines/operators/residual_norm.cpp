// GroupNorm and SiLU of a residual sum, channels last, for a convolution that follows: in float32,
// or rounded to uint8 for one in int8. An image passes over memory twice, whatever stands in it.
//
// Inputs:  x float [N, ..., C] and codes uint8 [N, ..., C], one of which may be missing: the sum is
//          x + scale * (code - zero_point); scale float [C], zero_point uint8 [C]: of the codes;
//          gamma, beta float [C], without which nothing is normalized; for uint8 also out_scale
//          float [C], of the result.
// Outputs: the result [N, ..., C] or, with channels_first, [N, C, ...]; the sum float [N, ..., C],
//          where it is asked for.
// Attributes: num_groups, epsilon, silu (0 or 1), channels_first (0 or 1, float alone),
// zero_point (of the result).
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "residual_norm.h"

namespace ssd_operators {
namespace {

constexpr int64_t numbers_of_turn = 1 << 16;  // that a thread takes at a time

void need(bool holds, char const* what) {
    if (!holds) {
        throw Ort::Exception(std::string("ResidualNorm: ") + what, ORT_INVALID_ARGUMENT);
    }
}

template <class Number>
Number const* data_of(Ort::ConstValue const& value) {
    return value ? value.GetTensorData<Number>() : nullptr;
}

// One run over a batch: its tensors, and the work of one block of places.
class Run {
public:
    Run(Kernels const& kernels, int num_groups, double epsilon)
        : kernels_(kernels), num_groups_(num_groups), epsilon_(epsilon) {}

    Feature feature{};  // of the whole batch
    float const *gamma = nullptr, *beta = nullptr;
    Finish finish{};  // but for factor and shift
    float* kept = nullptr;
    void* out = nullptr;
    int64_t num_images = 0, num_places = 0;
    int channels = 0;

    void run(Ort::KernelContext const& context) {
        places_of_block_ = std::max<int64_t>(1, numbers_of_turn / channels);
        // Mean and spread of codes are those of their numbers, and their scale goes into the
        // factor.
        has_raw_codes_ = gamma != nullptr && feature.x == nullptr && kept == nullptr;
        blocks_ = (num_places + places_of_block_ - 1) / places_of_block_;
        auto const size = static_cast<size_t>(channels);
        factor_.assign(size * static_cast<size_t>(num_images), 1);
        shift_.assign(factor_.size(), 0);
        if (gamma != nullptr || kept != nullptr) {
            pivot_.assign(factor_.size(), 0);
            totals_.resize(2 * size * static_cast<size_t>(num_images * blocks_));
            choose_pivots();
            in_parallel<&Run::measure>(context);
        }
        if (gamma != nullptr) {
            for (int64_t image = 0; image < num_images; ++image) {
                normalize(image);
            }
        }
        if (kept != nullptr) {
            feature = {kept, nullptr, nullptr, nullptr};
        }
        in_parallel<&Run::write>(context);
    }

private:
    using Turn = void (Run::*)(int64_t image, int64_t first, int64_t count, int64_t block);

    template <Turn turn>
    void in_parallel(Ort::KernelContext const& context) {
        parallel_for(context, num_images * blocks_, [this](int64_t block) {
            int64_t const first = block % blocks_ * places_of_block_;
            int64_t const count = std::min(places_of_block_, num_places - first);
            (this->*turn)(block / blocks_, first, count, block);
        });
    }

    Feature part(int64_t image, int64_t first) const {
        Feature from = feature;
        from.scale = has_raw_codes_ ? nullptr : from.scale;
        int64_t const at = (image * num_places + first) * channels;
        from.x = from.x == nullptr ? nullptr : from.x + at;
        from.codes = from.codes == nullptr ? nullptr : from.codes + at;
        return from;
    }

    // Sums are taken around the first place's numbers: less is lost where a mean is large.
    void choose_pivots() {
        for (int64_t image = 0; image < num_images; ++image) {
            Feature const from = part(image, 0);
            for (int i = 0; i < channels; ++i) {
                float number = from.x == nullptr ? 0 : from.x[i];
                if (from.codes != nullptr) {
                    auto const code = static_cast<float>(from.codes[i]);
                    number += from.scale == nullptr ? code : code * from.scale[i] + from.offset[i];
                }
                pivot_[static_cast<size_t>(image * channels + i)] = number;
            }
        }
    }

    void measure(int64_t image, int64_t first, int64_t count, int64_t block) {
        int64_t const at = (image * num_places + first) * channels;
        kernels_.measure(part(image, first), count, channels, pivot_.data() + image * channels,
                         kept == nullptr ? nullptr : kept + at,
                         totals_.data() + 2 * block * channels);
    }

    void write(int64_t image, int64_t first, int64_t count, int64_t) {
        Finish how = finish;
        how.factor = factor_.data() + image * channels;
        how.shift = shift_.data() + image * channels;
        int64_t at = (image * num_places + first) * channels;
        if (how.plane != 0) {
            at = image * num_places * channels + first;
        }
        void* const to = how.inverse == nullptr
                             ? static_cast<void*>(static_cast<float*>(out) + at)
                             : static_cast<void*>(static_cast<uint8_t*>(out) + at);
        kernels_.finish(part(image, first), count, channels, how, to);
    }

    // Factor and shift of an image's channels from the sums of its blocks, in their order: the same
    // for any number of threads.
    void normalize(int64_t image) {
        auto const size = static_cast<size_t>(channels);
        auto const count = static_cast<double>(num_places);
        std::vector<double> mean(size), spread(size);
        for (int64_t block = 0; block < blocks_; ++block) {
            float const* totals = totals_.data() + 2 * (image * blocks_ + block) * channels;
            for (size_t i = 0; i < size; ++i) {
                mean[i] += totals[i];
                spread[i] += totals[size + i];
            }
        }
        float const* pivot = pivot_.data() + image * channels;
        for (size_t i = 0; i < size; ++i) {
            double const scale = has_raw_codes_ ? feature.scale[i] : 1;
            spread[i] = scale * scale * (spread[i] - mean[i] * mean[i] / count);
            mean[i] =
                scale * (pivot[i] + mean[i] / count) + (has_raw_codes_ ? feature.offset[i] : 0);
        }
        size_t const of_group = size / static_cast<size_t>(num_groups_);
        for (size_t first = 0; first < size; first += of_group) {
            double centre = 0, total = 0;
            for (size_t i = first; i < first + of_group; ++i) {
                centre += mean[i] / static_cast<double>(of_group);
            }
            for (size_t i = first; i < first + of_group; ++i) {
                total += spread[i] + count * (mean[i] - centre) * (mean[i] - centre);
            }
            double const variance = total / (count * static_cast<double>(of_group));
            double const inverse = 1 / std::sqrt(std::max(variance, 0.0) + epsilon_);
            for (size_t i = first; i < first + of_group; ++i) {
                double const factor = gamma[i] * inverse, shift = beta[i] - factor * centre;
                size_t const place = static_cast<size_t>(image) * size + i;
                factor_[place] =
                    static_cast<float>(has_raw_codes_ ? factor * feature.scale[i] : factor);
                shift_[place] =
                    static_cast<float>(has_raw_codes_ ? shift + factor * feature.offset[i] : shift);
            }
        }
    }

    Kernels const& kernels_;
    int num_groups_;
    double epsilon_;
    bool has_raw_codes_ = false;
    int64_t places_of_block_ = 0, blocks_ = 0;  // of an image
    std::vector<float> factor_, shift_, pivot_, totals_;
};

class ResidualNorm {
public:
    ResidualNorm(Ort::ConstKernelInfo const& info, bool quantizes)
        : num_groups_(static_cast<int>(info.GetAttribute<int64_t>("num_groups"))),
          epsilon_(info.GetAttribute<float>("epsilon")),
          silu_(info.GetAttribute<int64_t>("silu") != 0),
          channels_first_(info.GetAttribute<int64_t>("channels_first") != 0),
          zero_point_(static_cast<float>(info.GetAttribute<int64_t>("zero_point"))),
          quantizes_(quantizes),
          kernels_(kernels()) {
        need(num_groups_ > 0, "num_groups is not positive");
        need(!(quantizes_ && channels_first_), "codes are channels last");
    }

    void compute(Ort::KernelContext const& context) const {
        Run run(kernels_, num_groups_, epsilon_);
        auto const x = context.GetInput(0), codes = context.GetInput(1);
        need(x || codes, "neither x nor codes are there");
        auto shape = (x ? x : codes).GetTensorTypeAndShapeInfo().GetShape();
        need(shape.size() >= 2, "shape is not [N, ..., C]");
        need(!x || !codes || codes.GetTensorTypeAndShapeInfo().GetShape() == shape,
             "x and codes are of different shapes");
        run.channels = static_cast<int>(shape.back());
        need(run.channels > 0 && run.channels % channels_of_vector == 0 &&
                 run.channels % num_groups_ == 0,
             "channels are not a multiple of 16 and of num_groups");
        run.num_images = shape[0];
        run.num_places = 1;
        for (size_t i = 1; i + 1 < shape.size(); ++i) {
            run.num_places *= shape[i];
        }
        auto const of_channels = [&](size_t index) {
            auto const value = context.GetInput(index);
            need(!value || value.GetTensorTypeAndShapeInfo().GetElementCount() ==
                               static_cast<size_t>(run.channels),
                 "not one parameter a channel");
            return value;
        };
        run.feature.x = data_of<float>(x);
        run.feature.codes = data_of<uint8_t>(codes);
        std::vector<float> offset(static_cast<size_t>(run.channels)), inverse;
        if (codes) {
            run.feature.scale = data_of<float>(of_channels(2));
            auto const* const zero_point = data_of<uint8_t>(of_channels(3));
            need(run.feature.scale != nullptr && zero_point != nullptr, "codes have no scale");
            for (size_t i = 0; i < offset.size(); ++i) {
                offset[i] = -run.feature.scale[i] * static_cast<float>(zero_point[i]);
            }
            run.feature.offset = offset.data();
        }
        run.gamma = data_of<float>(of_channels(4));
        run.beta = data_of<float>(of_channels(5));
        need((run.gamma == nullptr) == (run.beta == nullptr), "gamma and beta go together");
        run.finish.silu = silu_;
        if (quantizes_) {
            auto const* const out_scale = data_of<float>(of_channels(6));
            need(out_scale != nullptr, "the result has no scale");
            inverse.resize(offset.size());
            std::transform(out_scale, out_scale + inverse.size(), inverse.begin(),
                           [](float scale) { return 1 / scale; });
            run.finish.inverse = inverse.data();
            run.finish.zero_point = zero_point_;
        }
        if (context.GetOutputCount() > 1) {
            run.kept =
                context.GetOutput(1, shape.data(), shape.size()).GetTensorMutableData<float>();
        }
        if (channels_first_) {
            std::rotate(shape.begin() + 1, shape.end() - 1, shape.end());
            run.finish.plane = run.num_places;
        }
        run.out = context.GetOutput(0, shape.data(), shape.size()).GetTensorMutableRawData();
        if (run.num_images * run.num_places > 0) {
            run.run(context);
        }
    }

private:
    int num_groups_;
    float epsilon_;
    bool silu_, channels_first_;
    float zero_point_;
    bool quantizes_;
    Kernels const& kernels_;
};

template <bool quantizes>
struct Norm : ResidualNorm {
    explicit Norm(Ort::ConstKernelInfo const& info) : ResidualNorm(info, quantizes) {}
};

template <bool quantizes>
struct Operator : CustomOperator<Operator<quantizes>, Norm<quantizes>> {
    Operator() {
        OrtCustomOp::GetMayInplace = may_inplace;
        OrtCustomOp::ReleaseMayInplace = [](int*, int*) {};
    }
    char const* GetName() const { return quantizes ? "ResidualNormQuantize" : "ResidualNorm"; }
    // The sum takes the place of x where nothing else reads it.
    static size_t may_inplace(int** inputs, int** outputs) {
        static int x = 0, sum = 1;
        *inputs = &x;
        *outputs = &sum;
        return 1;
    }
    size_t GetInputTypeCount() const { return quantizes ? 7 : 6; }
    size_t GetOutputTypeCount() const { return 2; }
    ONNXTensorElementDataType GetInputType(size_t index) const {
        return index == 1 || index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                                        : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
    ONNXTensorElementDataType GetOutputType(size_t index) const {
        return index == 0 && quantizes ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                                       : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
        return index < 6 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
        return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }
};

}  // namespace

OrtCustomOp const* residual_norm_operator() {
    static Operator<false> const made;
    return &made;
}

OrtCustomOp const* residual_norm_quantize_operator() {
    static Operator<true> const made;
    return &made;
}

}  // namespace ssd_operators
