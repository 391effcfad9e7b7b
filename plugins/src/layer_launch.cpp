#include "ssd_export/layer_launch.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace ssd_export {
namespace {

using Pointers = std::array<void const*, kMaxGroups>;

constexpr int64_t kProgramsAMultiprocessor = 2;  // that a split fills a GPU with
// More multiprocessors than any GPU has: workspaces are asked for before a GPU is known, and a
// larger one is filled as this one would be.
constexpr int64_t kMostMultiprocessors = 256;
constexpr size_t kAlignment = 256;  // of arrays in the workspace

// Arguments of all kernels, named as their parameters (ssd_export/kernels).
struct Arguments {
    void const* query_ptr;
    void const* key_ptr;
    void const* value_ptr;
    void const* position_ptr;
    void const* prompt_length_ptr;
    Pointers cache_keys;
    Pointers cache_values;
    Pointers cache_positions;
    Pointers cache_scores;
    void* present_ptr;
    void* score_ptr;
    void* logits_ptr;
    void* sums_ptr;
    void* largest_ptr;
    void* total_ptr;
    void* out_ptr;
    int32_t query_stride;
    int32_t key_stride;
    int32_t value_stride;
    int32_t num_splits;
    int32_t num_heads;
    int32_t query_group_size;
    int32_t grid_width;
    float score_decay;
    int32_t most_slots;
    OfGroups first_heads;
    OfGroups group_heads;
    OfGroups group_slots;
    OfGroups num_sinks;
    OfGroups num_recent;
    OfGroups by_score;
    OfGroups pinned_columns;
    OfGroups age_quota;
    OfGroups evict_every;
    void* scratch = nullptr;  // compiled Triton kernels end with two pointers; these need none
};

template <typename Value>
void add(std::vector<void const*>& places, Value const& value) {
    places.push_back(&value);
}

template <typename Value>
void add(std::vector<void const*>& places, std::array<Value, kMaxGroups> const& values) {
    for (Value const& value : values) {
        places.push_back(&value);
    }
}

// Where the arguments of a launch are, in order; a head group's one by one.
template <typename... Values>
std::vector<void const*> places_of(Values const&... values) {
    std::vector<void const*> places;
    (add(places, values), ...);
    return places;
}

// In the order of kernels.json.
std::vector<void const*> of_layer(Arguments const& a) {
    return places_of(a.query_ptr, a.key_ptr, a.value_ptr, a.position_ptr, a.prompt_length_ptr,
                     a.cache_keys, a.cache_values, a.cache_positions, a.cache_scores, a.logits_ptr,
                     a.out_ptr, a.query_stride, a.key_stride, a.value_stride, a.num_heads,
                     a.query_group_size, a.grid_width, a.score_decay, a.most_slots, a.first_heads,
                     a.group_heads, a.group_slots, a.num_sinks, a.num_recent, a.by_score,
                     a.pinned_columns, a.age_quota, a.evict_every, a.scratch, a.scratch);
}

std::vector<void const*> of_part(Arguments const& a) {
    return places_of(a.query_ptr, a.key_ptr, a.value_ptr, a.position_ptr, a.prompt_length_ptr,
                     a.cache_keys, a.cache_values, a.cache_positions, a.cache_scores, a.present_ptr,
                     a.score_ptr, a.logits_ptr, a.sums_ptr, a.largest_ptr, a.total_ptr,
                     a.query_stride, a.key_stride, a.value_stride, a.num_heads, a.query_group_size,
                     a.grid_width, a.score_decay, a.most_slots, a.first_heads, a.group_heads,
                     a.group_slots, a.num_sinks, a.num_recent, a.by_score, a.pinned_columns,
                     a.age_quota, a.evict_every, a.scratch, a.scratch);
}

std::vector<void const*> of_sum(Arguments const& a) {
    return places_of(a.cache_positions, a.cache_scores, a.present_ptr, a.score_ptr, a.logits_ptr,
                     a.sums_ptr, a.largest_ptr, a.total_ptr, a.out_ptr, a.num_splits, a.num_heads,
                     a.query_group_size, a.most_slots, a.first_heads, a.group_heads, a.group_slots,
                     a.by_score, a.scratch, a.scratch);
}

// Programs for the slots of one head: 1 where the heads alone fill the GPU
// (ssd_export/kernels/constants.py).
int32_t splits(AttentionFields const& fields, LayerSizes const& sizes,
               int64_t num_multiprocessors) {
    int64_t const programs = std::max<int64_t>(1, sizes.rows * sizes.num_heads);
    int64_t const known = std::min(num_multiprocessors, kMostMultiprocessors);
    int64_t const wanted = kProgramsAMultiprocessor * known / programs;
    int64_t const blocks =
        (sizes.most_slots + fields.kernel_block_slots - 1) / fields.kernel_block_slots;
    int64_t const most = std::min<int64_t>(blocks, fields.kernel_max_splits);
    return static_cast<int32_t>(std::max<int64_t>(1, std::min(wanted, most)));
}

size_t aligned(size_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

// What a launch for a layer keeps between attending and adding to the scores: a float a slot.
size_t logits_bytes(AttentionFields const& fields, LayerSizes const& sizes) {
    return fields.has_scores() ? static_cast<size_t>(sizes.rows) * sizes.num_heads *
                                     sizes.most_slots * sizeof(float)
                               : 0;
}

// What the parts of a split leave for their sum. heads: rows x KV heads; parts: of all of them.
class SplitArrays {
public:
    SplitArrays(AttentionFields const& fields, LayerSizes const& sizes, size_t heads,
                size_t parts) {
        size_t const group = static_cast<size_t>(sizes.query_group_size);
        size_t const slots = heads * sizes.most_slots;
        present_ = take(slots * sizeof(int32_t));
        score_ = take(slots * sizeof(float));
        logits_ = take(slots * group * sizeof(float));
        sums_ = take(parts * group * fields.kernel_head_dim * sizeof(float));
        largest_ = take(parts * group * sizeof(float));
        total_ = take(parts * group * sizeof(float));
    }

    size_t num_bytes() const { return end_; }

    void place(void* workspace, Arguments& arguments) const {
        auto* const start = static_cast<char*>(workspace);
        arguments.present_ptr = start + present_;
        arguments.score_ptr = start + score_;
        arguments.logits_ptr = start + logits_;
        arguments.sums_ptr = start + sums_;
        arguments.largest_ptr = start + largest_;
        arguments.total_ptr = start + total_;
    }

private:
    size_t take(size_t num_bytes) {
        size_t const start = end_;
        end_ += aligned(num_bytes);
        return start;
    }

    size_t end_ = 0;
    size_t present_, score_, logits_, sums_, largest_, total_;
};

Arguments arguments_of(AttentionFields const& fields, NodeTensors const& tensors,
                       LayerSizes const& sizes, void const* const* inputs, void* out) {
    Arguments a{};
    int32_t const dim = fields.kernel_head_dim,
                  query_heads = sizes.num_heads * sizes.query_group_size;
    size_t const head_bytes = static_cast<size_t>(dim) * fields.element_bytes();
    auto const* const heads = static_cast<char const*>(inputs[tensors.kHeads]);
    a.query_ptr = heads;
    a.key_ptr = heads + query_heads * head_bytes;
    a.value_ptr = heads + (query_heads + sizes.num_heads) * head_bytes;
    a.position_ptr = inputs[tensors.kPosition];
    a.prompt_length_ptr = inputs[tensors.kPromptLength];
    for (int32_t group = 0; group < kMaxGroups; ++group) {
        int32_t const there = group < fields.num_groups ? group : 0;  // the others are never read
        int32_t const score = tensors.input_of(there, kPastScore);
        a.cache_keys[group] = inputs[tensors.input_of(there, kPastKey)];
        a.cache_values[group] = inputs[tensors.input_of(there, kPastValue)];
        a.cache_positions[group] = inputs[tensors.input_of(there, kPastPosition)];
        a.cache_scores[group] = score < 0 ? nullptr : inputs[score];
    }
    a.out_ptr = out;
    a.query_stride = a.key_stride = a.value_stride = (query_heads + 2 * sizes.num_heads) * dim;
    a.num_heads = sizes.num_heads;
    a.query_group_size = sizes.query_group_size;
    a.grid_width = fields.grid_width;
    a.score_decay = fields.score_decay;
    a.most_slots = sizes.most_slots;
    a.first_heads = sizes.first_heads;
    a.group_heads = sizes.group_heads;
    a.group_slots = sizes.group_slots;
    a.num_sinks = fields.num_sinks;
    a.num_recent = fields.num_recent;
    a.by_score = fields.by_score;
    a.pinned_columns = fields.pinned_columns;
    a.age_quota = fields.age_quota;
    a.evict_every = fields.evict_every;
    return a;
}

void check_workspace(void const* workspace, size_t num_bytes) {
    if (workspace == nullptr && num_bytes > 0) {
        throw std::runtime_error("TensorRT gave no workspace of " + std::to_string(num_bytes) +
                                 " bytes");
    }
}

}  // namespace

size_t workspace_bytes(AttentionFields const& fields, LayerSizes const& most) {
    auto const heads = static_cast<size_t>(most.rows) * most.num_heads;
    // Slots are split where a GPU has a multiprocessor for each head, or more.
    size_t const split = std::min<size_t>(heads, kMostMultiprocessors);
    size_t const parts = std::min<size_t>(kProgramsAMultiprocessor * kMostMultiprocessors,
                                          split * fields.kernel_max_splits);
    SplitArrays const arrays(fields, most, split, parts);
    return std::max(logits_bytes(fields, most), arrays.num_bytes());
}

void launch_layer(AttentionFields const& fields, NodeTensors const& tensors,
                  LayerSizes const& sizes, LayerKernels const& kernels, void const* const* inputs,
                  void* out, void* workspace, CUstream stream) {
    Arguments a = arguments_of(fields, tensors, sizes, inputs, out);
    int64_t const heads = sizes.rows * sizes.num_heads;
    a.num_splits = splits(fields, sizes, kernels.num_multiprocessors);
    if (a.num_splits == 1) {
        check_workspace(workspace, logits_bytes(fields, sizes));
        a.logits_ptr = workspace;
        kernels.layer->launch({heads}, of_layer(a).data(), stream);
        return;
    }
    SplitArrays const arrays(fields, sizes, heads, heads * a.num_splits);
    check_workspace(workspace, arrays.num_bytes());
    arrays.place(workspace, a);
    kernels.part->launch({heads, a.num_splits}, of_part(a).data(), stream);
    kernels.sum->launch({heads}, of_sum(a).data(), stream);
}

}  // namespace ssd_export
