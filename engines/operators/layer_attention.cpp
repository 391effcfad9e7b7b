// One step of all head groups of a layer: RoPE, R3 to R7 of the cache (ssd_export/policy),
// attention and scores in one operator, in float32.
//
// Inputs:  qkv [B, (HQ + 2 H) * D]: queries, keys and values of all heads, group after group;
//          cos, sin [B, HQ + 2 H, D]: of RoPE, sin with the signs of the rotation;
//          position, prompt_length int32 [B]; then of each group past key, value [B, h, S, D],
//          position int32 [B, h, S] and, where it ranks by score, score [B, h, S].
// Outputs: out [B, HQ * D], then the present of each past, which may share its memory.
// A group evicts in the step where ranks is 1; elsewhere it has an empty slot (the evict graph ran
// before), or it is a ring, whose oldest token goes.
#include "layer_attention.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "head_attention.h"

namespace ssd_operators {
namespace {

constexpr float protected_rank = 3.0e38F;

struct Group {
    int num_heads, num_sinks, num_recent;
    bool by_score, ranks;
    int64_t pinned_columns;
    int first_head;  // of all KV heads of the layer
};

struct Step {
    float const *qkv, *cos, *sin;
    int32_t const *position, *prompt_length;
    float* out;
    std::vector<Slots> slots;  // of each group, at its first row and head
};

class LayerAttention {
public:
    explicit LayerAttention(Ort::ConstKernelInfo const& info)
        : head_dim_(static_cast<int>(info.GetAttribute<int64_t>("head_dim"))),
          query_group_size_(static_cast<int>(info.GetAttribute<int64_t>("query_group_size"))),
          grid_width_(static_cast<int>(info.GetAttribute<int64_t>("grid_width"))),
          score_decay_(info.GetAttribute<float>("score_decay")),
          kernel_(head_attention()) {
        auto const numbers = [&](char const* name) { return info.GetAttributes<int64_t>(name); };
        auto const heads = numbers("num_heads"), sinks = numbers("num_sinks"),
                   recent = numbers("num_recent"), by_score = numbers("by_score"),
                   ranks = numbers("ranks"), pinned = numbers("pinned_columns");
        for (size_t i = 0; i < heads.size(); ++i) {
            groups_.push_back({static_cast<int>(heads[i]), static_cast<int>(sinks.at(i)),
                               static_cast<int>(recent.at(i)), by_score.at(i) != 0,
                               ranks.at(i) != 0, pinned.at(i), num_heads_});
            for (int head = 0; head < groups_.back().num_heads; ++head) {
                group_of_head_.push_back(i);
            }
            num_heads_ += static_cast<int>(heads[i]);
        }
    }

    void compute(Ort::KernelContext const& context) {
        Step step{};
        auto const qkv = context.GetInput(0);
        auto const shape = qkv.GetTensorTypeAndShapeInfo().GetShape();
        int const num_queries = num_heads_ * query_group_size_;
        int64_t const width = static_cast<int64_t>(num_queries + 2 * num_heads_) * head_dim_;
        if (shape.size() != 2 || shape[1] != width) {
            throw Ort::Exception("LayerAttention: qkv has another width than its attributes say",
                                 ORT_INVALID_ARGUMENT);
        }
        step.qkv = qkv.GetTensorData<float>();
        step.cos = context.GetInput(1).GetTensorData<float>();
        step.sin = context.GetInput(2).GetTensorData<float>();
        step.position = context.GetInput(3).GetTensorData<int32_t>();
        step.prompt_length = context.GetInput(4).GetTensorData<int32_t>();
        int64_t const out_shape[] = {shape[0], static_cast<int64_t>(num_queries) * head_dim_};
        step.out = context.GetOutput(0, out_shape, 2).GetTensorMutableData<float>();
        size_t tensor = 0;
        for (Group const& group : groups_) {
            Slots slots{};
            slots.key = static_cast<float*>(present(context, tensor++, slots));
            slots.value = static_cast<float*>(present(context, tensor++, slots));
            slots.position = static_cast<int32_t*>(present(context, tensor++, slots));
            if (group.by_score) {
                slots.score = static_cast<float*>(present(context, tensor++, slots));
            }
            step.slots.push_back(slots);
        }
        using Work = std::pair<LayerAttention const*, Step const*>;
        Work work{this, &step};
        context.ParallelFor(
            [](void* data, size_t number) {
                auto const* const of = static_cast<Work const*>(data);
                of->first->head(*of->second, static_cast<int64_t>(number));
            },
            static_cast<size_t>(shape[0] * num_heads_), 0, &work);
    }

private:
    // The memory of a present tensor, with the past in it: copied where they are two.
    static void* present(Ort::KernelContext const& context, size_t tensor, Slots& slots) {
        auto const past = context.GetInput(5 + tensor);
        auto const info = past.GetTensorTypeAndShapeInfo();
        auto const shape = info.GetShape();
        auto value = context.GetOutput(1 + tensor, shape.data(), shape.size());
        void* const memory = value.GetTensorMutableRawData();
        if (memory != past.GetTensorRawData()) {
            std::memcpy(memory, past.GetTensorRawData(), info.GetElementCount() * sizeof(float));
        }
        slots.num_slots = static_cast<int>(shape.at(2));
        return memory;
    }

    // A head of a row, by its number among those of all rows.
    void head(Step const& step, int64_t number) const {
        int64_t const row = number / num_heads_;
        auto const head = static_cast<int>(number % num_heads_);
        size_t const index = group_of_head_[static_cast<size_t>(head)];
        Group const& group = groups_[index];
        Slots slots = step.slots[index];
        int64_t const place = (row * group.num_heads + head - group.first_head) * slots.num_slots;
        slots.key += place * head_dim_;
        slots.value += place * head_dim_;
        slots.position += place;
        slots.score = group.by_score ? slots.score + place : nullptr;

        int const slot = place_of_token(group, slots, step.position[row], step.prompt_length[row]);
        int const first_query = head * query_group_size_;
        int const first_key = num_heads_ * query_group_size_;
        int64_t const first = row * (first_key + 2 * num_heads_);
        turn(step, first + first_key + head, 1.0F, slots.key + slot * head_dim_);
        turn(step, first + first_key + num_heads_ + head, 1.0F, slots.value + slot * head_dim_);
        slots.position[slot] = step.position[row];
        if (slots.score != nullptr) {
            slots.score[slot] = 0;
        }
        std::vector<float> scratch(
            static_cast<size_t>(slots.num_slots + query_group_size_ * head_dim_));
        float* const queries = scratch.data() + slots.num_slots;
        float const factor = 1 / std::sqrt(static_cast<float>(head_dim_));
        for (int query = 0; query < query_group_size_; ++query) {
            turn(step, first + first_query + query, factor, queries + query * head_dim_);
        }
        int64_t const out = row * first_key + first_query;
        kernel_.attend(slots, queries, query_group_size_, head_dim_, scratch.data(),
                       step.out + out * head_dim_);
    }

    // RoPE of a head, by its number among those of all rows, times a factor.
    void turn(Step const& step, int64_t head, float factor, float* out) const {
        int const half = head_dim_ / 2;
        float const *in = step.qkv + head * head_dim_, *cos = step.cos + head * head_dim_,
                    *sin = step.sin + head * head_dim_;
        for (int i = 0; i < half; ++i) {
            float const first = in[i] * cos[i] + in[half + i] * sin[i];
            float const second = in[half + i] * cos[half + i] + in[i] * sin[half + i];
            out[i] = first * factor;
            out[half + i] = second * factor;
        }
    }

    // The slot that the new token takes: the lowest empty one (R6), else that of least retention,
    // whose eviction decays the scores (R5, R2).
    int place_of_token(Group const& group, Slots const& slots, int32_t position,
                       int32_t prompt_length) const {
        int const oldest = kernel_.lowest(slots.position, slots.num_slots);
        if (!group.ranks || slots.position[oldest] < 0) {
            return oldest;
        }
        int place = 0;
        float least = rank(group, slots, 0, position, prompt_length);
        for (int slot = 1; slot < slots.num_slots; ++slot) {
            float const own = rank(group, slots, slot, position, prompt_length);
            if (own < least) {
                place = slot;
                least = own;
            }
        }
        if (slots.score != nullptr && score_decay_ != 1) {
            for (int slot = 0; slot < slots.num_slots; ++slot) {
                slots.score[slot] *= score_decay_;
            }
        }
        return place;
    }

    // Retention of a slot that holds a token (R3).
    float rank(Group const& group, Slots const& slots, int slot, int32_t position,
               int32_t prompt_length) const {
        int32_t const held = slots.position[slot];
        int32_t const index = held - prompt_length;
        bool const is_sink = held < (group.num_sinks < 0 ? prompt_length : group.num_sinks);
        bool const is_recent = group.num_recent > 1 && held > position - group.num_recent;
        bool const is_pinned =
            index >= 0 && ((group.pinned_columns >> (index % grid_width_)) & 1) != 0;
        if (is_sink || is_recent || is_pinned) {
            return protected_rank;
        }
        return group.by_score ? slots.score[slot] : static_cast<float>(held);
    }

    int head_dim_, query_group_size_, grid_width_;
    float score_decay_;
    HeadAttention const& kernel_;
    int num_heads_ = 0;
    std::vector<Group> groups_;
    std::vector<size_t> group_of_head_;
};

// Runs something of C++ for ONNX Runtime, which is C.
template <class Work>
OrtStatus* status_of(Work&& work) noexcept {
    try {
        work();
        return nullptr;
    } catch (Ort::Exception const& error) {
        return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
    } catch (std::exception const& error) {
        return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
}

struct Kernel {
    LayerAttention attention;

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return status_of([&] { attention.compute(Ort::KernelContext(context)); });
    }
};

struct Operator : Ort::CustomOpBase<Operator, Kernel, true> {
    OrtStatusPtr CreateKernelV2(OrtApi const&, OrtKernelInfo const* info, void** kernel) const {
        return status_of([&] { *kernel = new Kernel{LayerAttention(Ort::ConstKernelInfo(info))}; });
    }
    char const* GetName() const { return "LayerAttention"; }
    char const* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    size_t GetInputTypeCount() const { return 6; }
    size_t GetOutputTypeCount() const { return 2; }
    ONNXTensorElementDataType GetInputType(size_t index) const {
        return index < 3   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
               : index < 5 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
                           : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }
    ONNXTensorElementDataType GetOutputType(size_t index) const {
        return index < 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                         : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
        return index < 5 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
    }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
        return index < 1 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
    }
    bool GetVariadicInputHomogeneity() const { return false; }
    bool GetVariadicOutputHomogeneity() const { return false; }
};

}  // namespace

OrtStatus* add_operators(OrtSessionOptions* options) {
    return status_of([&] {
        static Operator const layer_attention;
        // Kept to the end of the process: sessions that are closed last still know it.
        static Ort::CustomOpDomain const& domain = *[] {
            auto* made = new Ort::CustomOpDomain("ssd_export");
            made->Add(&layer_attention);
            return made;
        }();
        Ort::ThrowOnError(Ort::GetApi().AddCustomOpDomain(options, domain));
    });
}

}  // namespace ssd_operators
