#include "ssd_export/layer_launch.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "ssd_export/kernel.h"
#include "ssd_export/launch_arguments.h"
#include "ssd_export/layer_shapes.h"

namespace ssd_export {
namespace {

constexpr int64_t kProgramsAMultiprocessor = 2;  // that a split fills a GPU with
// More multiprocessors than any GPU has: workspaces are asked for before a GPU is known, and a
// larger one is filled as this one would be.
constexpr int64_t kMostMultiprocessors = 256;
constexpr size_t kAlignment = 256;  // of arrays in the workspace

enum StepKernel { kLayer, kPart, kSum };  // in the order of the kind's table

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

void check_workspace(void const* workspace, size_t num_bytes) {
    if (workspace == nullptr && num_bytes > 0) {
        throw std::runtime_error("TensorRT gave no workspace of " + std::to_string(num_bytes) +
                                 " bytes");
    }
}

}  // namespace

size_t layer_workspace_bytes(AttentionFields const& fields, LayerSizes const& most) {
    auto const heads = static_cast<size_t>(most.rows) * most.num_heads;
    // Slots are split where a GPU has a multiprocessor for each head, or more.
    size_t const split = std::min<size_t>(heads, kMostMultiprocessors);
    size_t const parts = std::min<size_t>(kProgramsAMultiprocessor * kMostMultiprocessors,
                                          split * fields.kernel_max_splits);
    SplitArrays const arrays(fields, most, split, parts);
    return std::max(logits_bytes(fields, most), arrays.num_bytes());
}

void launch_layer(Launch const& launch) {
    AttentionFields const& fields = launch.fields;
    LayerSizes const& sizes = launch.sizes;
    Arguments a(launch);
    a.prompt_length_ptr = launch.inputs[kPromptLength];
    a.out_ptr = launch.outputs[0];
    int64_t const heads = sizes.rows * sizes.num_heads;
    a.num_splits = splits(fields, sizes, launch.kernels.num_multiprocessors);
    if (a.num_splits == 1) {
        check_workspace(launch.workspace, logits_bytes(fields, sizes));
        a.logits_ptr = launch.workspace;
        launch.kernels[kLayer].launch({heads}, of_layer(a).data(), launch.stream);
        return;
    }
    SplitArrays const arrays(fields, sizes, heads, heads * a.num_splits);
    check_workspace(launch.workspace, arrays.num_bytes());
    arrays.place(launch.workspace, a);
    launch.kernels[kPart].launch({heads, a.num_splits}, of_part(a).data(), launch.stream);
    launch.kernels[kSum].launch({heads}, of_sum(a).data(), launch.stream);
}

}  // namespace ssd_export
