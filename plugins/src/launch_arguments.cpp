#include "ssd_export/launch_arguments.h"

#include "ssd_export/layer_shapes.h"

namespace ssd_export {

Arguments::Arguments(Launch const& launch) {
    AttentionFields const& fields = launch.fields;
    NodeTensors const& tensors = launch.tensors;
    LayerSizes const& sizes = launch.sizes;
    int32_t const query_heads = sizes.num_heads * sizes.query_group_size;
    int32_t const head = sizes.num_places * fields.kernel_head_dim;  // of a row, all its places
    size_t const head_bytes = static_cast<size_t>(head) * fields.element_bytes();
    auto const* const heads = static_cast<char const*>(launch.inputs[kHeads]);
    query_ptr = heads;
    key_ptr = heads + query_heads * head_bytes;
    value_ptr = heads + (query_heads + sizes.num_heads) * head_bytes;
    position_ptr = launch.inputs[kPosition];
    for (int32_t group = 0; group < kMaxGroups; ++group) {
        int32_t const there = group < fields.num_groups ? group : 0;  // others are never read
        int32_t const score = tensors.input_of(there, kPastScore);
        cache_keys[group] = launch.inputs[tensors.input_of(there, kPastKey)];
        cache_values[group] = launch.inputs[tensors.input_of(there, kPastValue)];
        cache_positions[group] = launch.inputs[tensors.input_of(there, kPastPosition)];
        cache_scores[group] = score < 0 ? nullptr : launch.inputs[score];
    }
    query_stride = key_stride = value_stride = (query_heads + 2 * sizes.num_heads) * head;
    num_places = sizes.num_places;
    num_heads = sizes.num_heads;
    query_group_size = sizes.query_group_size;
    grid_width = fields.grid_width;
    score_decay = fields.score_decay;
    most_slots = sizes.most_slots;
    kept_slots = sizes.kept_slots;
    first_heads = sizes.first_heads;
    group_heads = sizes.group_heads;
    group_slots = sizes.group_slots;
    num_sinks = fields.num_sinks;
    num_recent = fields.num_recent;
    by_score = fields.by_score;
    pinned_columns = fields.pinned_columns;
    age_quota = fields.age_quota;
    evict_every = fields.evict_every;
}

}  // namespace ssd_export
