// One step of all head groups of a layer: RoPE, R3 to R7 of the cache (ssd_export/policy),
// attention and scores in one operator, in float32 over a cache in float32, float16 or int8.
//
// Inputs:  qkv [B, (HQ + 2 H) * D]: queries, keys and values of all heads, group after group;
//          cos, sin of RoPE: D / 2 numbers of each row;
//          position, prompt_length int32 [B]; then of each group past key, value [B, h, S, D],
//          where these are int8 their scales float [B, h, S], position int32 [B, h, S] and, where
//          it ranks by score, score float [B, h, S].
// Outputs: out [B, HQ * D], then the present of each past, which may share its memory.
// A head without an empty slot evicts as many tokens as its group does at once, so that no graph
// has to run between steps; where one did, there is an empty slot.
#include "layer_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "packed_product.h"
#include "quantized_product.h"
#include "residual_norm.h"
#include "step_operators.h"

namespace ssd_operators {
namespace {

constexpr float protected_rank = 3.0e38F;
constexpr float gone = std::numeric_limits<float>::infinity();  // rank of what was evicted

struct Group {
    int num_heads, num_sinks, num_recent, evict_every;
    bool by_score, age_quota;
    int64_t pinned_columns;
    int first_head;  // of all KV heads of the layer

    // Whether the oldest token always goes.
    bool is_ring() const {
        return evict_every == 1 && !by_score && !age_quota && num_sinks == 0 && num_recent <= 1 &&
               pinned_columns == 0;
    }
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
          kernels_(kernels()) {
        auto const numbers = [&](char const* name) { return info.GetAttributes<int64_t>(name); };
        auto const heads = numbers("num_heads"), sinks = numbers("num_sinks"),
                   recent = numbers("num_recent"), by_score = numbers("by_score"),
                   every = numbers("evict_every"), quota = numbers("age_quota"),
                   pinned = numbers("pinned_columns");
        for (size_t i = 0; i < heads.size(); ++i) {
            groups_.push_back({static_cast<int>(heads[i]), static_cast<int>(sinks.at(i)),
                               static_cast<int>(recent.at(i)), static_cast<int>(every.at(i)),
                               by_score.at(i) != 0, quota.at(i) != 0, pinned.at(i), num_heads_});
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
        for (size_t table : {1, 2}) {
            auto const count =
                context.GetInput(table).GetTensorTypeAndShapeInfo().GetElementCount();
            if (count != static_cast<size_t>(shape[0] * (head_dim_ / 2))) {
                throw Ort::Exception("LayerAttention: cos and sin have half a head a row",
                                     ORT_INVALID_ARGUMENT);
            }
        }
        step.position = context.GetInput(3).GetTensorData<int32_t>();
        step.prompt_length = context.GetInput(4).GetTensorData<int32_t>();
        int64_t const out_shape[] = {shape[0], static_cast<int64_t>(num_queries) * head_dim_};
        step.out = context.GetOutput(0, out_shape, 2).GetTensorMutableData<float>();
        size_t tensor = 0;
        for (Group const& group : groups_) {
            Slots slots{};
            slots.rows = rows_of(context, tensor);
            slots.key = present(context, tensor++, slots);
            slots.value = present(context, tensor++, slots);
            if (slots.rows == CacheRows::int8) {
                slots.key_scale = static_cast<float*>(present(context, tensor++, slots));
                slots.value_scale = static_cast<float*>(present(context, tensor++, slots));
            }
            slots.position = static_cast<int32_t*>(present(context, tensor++, slots));
            if (group.by_score) {
                slots.score = static_cast<float*>(present(context, tensor++, slots));
            }
            step.slots.push_back(slots);
        }
        int64_t const rows = shape[0];
        parallel_for(context, rows * num_heads_, [&](int64_t number) { head(step, number, rows); });
    }

private:
    static constexpr size_t first_past = 5;

    static CacheRows rows_of(Ort::KernelContext const& context, size_t tensor) {
        auto const past = context.GetInput(first_past + tensor);
        switch (past.GetTensorTypeAndShapeInfo().GetElementType()) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return CacheRows::float32;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return CacheRows::float16;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return CacheRows::int8;
        default:
            throw Ort::Exception("LayerAttention: a cache in other than float32, float16 or int8",
                                 ORT_INVALID_ARGUMENT);
        }
    }

    static size_t bytes_of(ONNXTensorElementDataType type) {
        return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8      ? 1
               : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2
                                                               : 4;
    }

    // The memory of a present tensor, with the past in it: copied where they are two.
    static void* present(Ort::KernelContext const& context, size_t tensor, Slots& slots) {
        auto const past = context.GetInput(first_past + tensor);
        auto const info = past.GetTensorTypeAndShapeInfo();
        auto const shape = info.GetShape();
        auto value = context.GetOutput(1 + tensor, shape.data(), shape.size());
        void* const memory = value.GetTensorMutableRawData();
        if (memory != past.GetTensorRawData()) {
            size_t const item = bytes_of(info.GetElementType());
            std::memcpy(memory, past.GetTensorRawData(), info.GetElementCount() * item);
        }
        slots.num_slots = static_cast<int>(shape.at(2));
        return memory;
    }

    // A head of a row, by its number: those of a group follow one another as they lie in memory.
    void head(Step const& step, int64_t number, int64_t num_rows) const {
        size_t index = 0;
        while (number >= num_rows * groups_[index].num_heads) {
            number -= num_rows * groups_[index].num_heads;
            ++index;
        }
        Group const& group = groups_[index];
        int64_t const row = number / group.num_heads;
        auto const head = group.first_head + static_cast<int>(number % group.num_heads);
        Slots slots = step.slots[index];
        move_to_head(slots, number * slots.num_slots);

        int const slot = place_of_token(group, slots, step.position[row], step.prompt_length[row]);
        int const first_query = head * query_group_size_;
        int const first_key = num_heads_ * query_group_size_;
        float const* const qkv = step.qkv + row * (first_key + 2 * num_heads_) * head_dim_;
        int const half = head_dim_ / 2;
        Angles const angles{step.cos + row * half, step.sin + row * half};
        int const room = slots.num_slots + most_lanes;
        float* const scratch = scratch_of(2 * room + query_group_size_ * head_dim_);
        kernels_.turn(qkv + (first_key + head) * head_dim_, angles, half, 1.0F, scratch);
        write(slots, slot, scratch, qkv + (first_key + num_heads_ + head) * head_dim_);
        slots.position[slot] = step.position[row];
        if (slots.score != nullptr) {
            slots.score[slot] = 0;
        }
        float* const queries = scratch + 2 * room;
        float const factor = 1 / std::sqrt(static_cast<float>(head_dim_));
        for (int query = 0; query < query_group_size_; ++query) {
            kernels_.turn(qkv + (first_query + query) * head_dim_, angles, half, factor,
                          queries + query * head_dim_);
        }
        int64_t const out = row * first_key + first_query;
        kernels_.attend(slots, queries, query_group_size_, head_dim_, scratch,
                        step.out + out * head_dim_);
    }

    // From a group's first slot to that of a head, so many slots on.
    void move_to_head(Slots& slots, int64_t place) const {
        slots.key = row_at(slots, slots.key, place);
        slots.value = row_at(slots, slots.value, place);
        slots.position += place;
        for (float** number : {&slots.key_scale, &slots.value_scale, &slots.score}) {
            *number = *number == nullptr ? nullptr : *number + place;
        }
    }

    void* row_at(Slots const& slots, void* rows, int64_t slot) const {
        int const item_bytes = slots.rows == CacheRows::float32   ? 4
                               : slots.rows == CacheRows::float16 ? 2
                                                                  : 1;
        return static_cast<char*>(rows) + slot * head_dim_ * item_bytes;
    }

    void write(Slots const& slots, int slot, float const* key, float const* value) const {
        bool const has_scales = slots.rows == CacheRows::int8;
        kernels_.write_row(slots.rows, key, head_dim_, row_at(slots, slots.key, slot),
                           has_scales ? slots.key_scale + slot : nullptr);
        kernels_.write_row(slots.rows, value, head_dim_, row_at(slots, slots.value, slot),
                           has_scales ? slots.value_scale + slot : nullptr);
    }

    // The slot that the new token takes: the lowest empty one (R6), after an eviction where there
    // is none (R7). A ring's is the oldest token's.
    int place_of_token(Group const& group, Slots const& slots, int32_t position,
                       int32_t prompt_length) const {
        int const oldest = kernels_.lowest(slots.position, slots.num_slots);
        if (group.is_ring() || slots.position[oldest] < 0) {
            return oldest;
        }
        float* const ranks = scratch_of(2 * slots.num_slots);
        for (int slot = 0; slot < slots.num_slots; ++slot) {
            ranks[slot] = rank(group, slots, slot, position, prompt_length);
        }
        if (!group.age_quota) {
            evict(slots, ranks, group.evict_every);
        } else {
            float* const leading = ranks + slots.num_slots;
            divide_by_age(slots, position, ranks, leading);
            evict(slots, leading, group.evict_every - group.evict_every / 2);
            evict(slots, ranks, group.evict_every / 2);
        }
        if (slots.score != nullptr && score_decay_ != 1) {
            for (int slot = 0; slot < slots.num_slots; ++slot) {
                slots.score[slot] *= score_decay_;
            }
        }
        return kernels_.lowest(slots.position, slots.num_slots);
    }

    // Empties the slots of least rank, of equal ones the lower first (R4, R5).
    void evict(Slots const& slots, float* ranks, int count) const {
        for (int done = 0; done < count; ++done) {
            int const slot = kernels_.least(ranks, slots.num_slots);
            slots.position[slot] = -1;
            ranks[slot] = gone;
        }
    }

    // Divides what is not protected by age (R3, age_quota): the ranks of the half that leads go to
    // leading, those of the other stay; elsewhere a slot counts as protected.
    static void divide_by_age(Slots const& slots, int32_t newest, float* ranks, float* leading) {
        std::vector<int32_t> ages;
        for (int slot = 0; slot < slots.num_slots; ++slot) {
            if (ranks[slot] < protected_rank) {
                ages.push_back(slots.position[slot]);
            }
        }
        if (ages.empty()) {  // no numbers at all
            std::copy_n(ranks, slots.num_slots, leading);
            return;
        }
        std::sort(ages.begin(), ages.end());
        size_t const half = (ages.size() + 1) / 2;
        bool const oldest_lead = newest % 2 == 0;
        int32_t const border = oldest_lead ? ages[half - 1] : ages[ages.size() - half];
        for (int slot = 0; slot < slots.num_slots; ++slot) {
            int32_t const held = slots.position[slot];
            bool const leads = oldest_lead ? held <= border : held >= border;
            leading[slot] = leads ? ranks[slot] : protected_rank;
            ranks[slot] = leads ? protected_rank : ranks[slot];
        }
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
    Kernels const& kernels_;
    int num_heads_ = 0;
    std::vector<Group> groups_;
};

struct Operator : CustomOperator<Operator, LayerAttention> {
    char const* GetName() const { return "LayerAttention"; }
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
            made->Add(packed_product_operator());
            made->Add(quantized_product_operator());
            made->Add(gated_silu_operator());
            made->Add(draw_token_operator());
            made->Add(residual_norm_operator());
            made->Add(residual_norm_quantize_operator());
            return made;
        }();
        Ort::ThrowOnError(Ort::GetApi().AddCustomOpDomain(options, domain));
    });
}

}  // namespace ssd_operators
