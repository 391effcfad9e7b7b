#include "ssd_export/window_launch.h"

#include "ssd_export/kernel.h"
#include "ssd_export/launch_arguments.h"
#include "ssd_export/layer_shapes.h"

namespace ssd_export {
namespace {

// In the order of the kinds' tables.
enum WindowKernel { kEvict, kAttend };
enum SettleKernel { kWrite };
enum WindowOutput { kWindowOut, kWindowLogits, kWindowLargest, kWindowTotal };

// In the order of kernels.json.
std::vector<void const*> of_evict(Arguments const& a) {
    return places_of(a.position_ptr, a.prompt_length_ptr, a.active_ptr, a.cache_positions,
                     a.cache_scores, a.num_heads, a.grid_width, a.score_decay, a.first_heads,
                     a.group_heads, a.group_slots, a.num_sinks, a.num_recent, a.by_score,
                     a.pinned_columns, a.age_quota, a.evict_every, a.scratch, a.scratch);
}

std::vector<void const*> of_attend(Arguments const& a) {
    return places_of(a.query_ptr, a.key_ptr, a.value_ptr, a.cache_keys, a.cache_values,
                     a.cache_positions, a.logits_ptr, a.largest_ptr, a.total_ptr, a.out_ptr,
                     a.query_stride, a.key_stride, a.value_stride, a.kept_slots, a.num_heads,
                     a.query_group_size, a.first_heads, a.group_heads, a.group_slots, a.by_score,
                     a.scratch, a.scratch);
}

std::vector<void const*> of_write(Arguments const& a) {
    return places_of(a.key_ptr, a.value_ptr, a.position_ptr, a.counts_ptr, a.cache_keys,
                     a.cache_values, a.cache_positions, a.cache_scores, a.logits_ptr, a.largest_ptr,
                     a.total_ptr, a.key_stride, a.value_stride, a.num_places, a.kept_slots,
                     a.num_heads, a.query_group_size, a.first_heads, a.group_heads, a.group_slots,
                     a.by_score, a.scratch, a.scratch);
}

int64_t programs_of(LayerSizes const& sizes) { return sizes.rows * sizes.num_heads; }

}  // namespace

size_t no_workspace_bytes(AttentionFields const& fields, LayerSizes const& most) { return 0; }

void launch_window(Launch const& launch) {
    Arguments a(launch);
    LayerSizes const& sizes = launch.sizes;
    a.prompt_length_ptr = launch.inputs[kPromptLength];
    a.active_ptr = launch.inputs[kActive];
    a.out_ptr = launch.outputs[kWindowOut];
    a.logits_ptr = launch.outputs[kWindowLogits];
    a.largest_ptr = launch.outputs[kWindowLargest];
    a.total_ptr = launch.outputs[kWindowTotal];
    int64_t const programs = programs_of(sizes);
    launch.kernels[kEvict].launch({programs}, of_evict(a).data(), launch.stream);
    launch.kernels[kAttend].launch({programs, sizes.query_group_size * sizes.num_places},
                                   of_attend(a).data(), launch.stream);
}

void launch_settle(Launch const& launch) {
    Arguments a(launch);
    a.counts_ptr = launch.inputs[kCounts];
    a.logits_ptr = launch.inputs[kLogits];
    a.largest_ptr = launch.inputs[kLargest];
    a.total_ptr = launch.inputs[kTotal];
    launch.kernels[kWrite].launch({programs_of(launch.sizes)}, of_write(a).data(), launch.stream);
}

}  // namespace ssd_export
