#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "ssd_export/attention_fields.h"
#include "ssd_export/node_kind.h"

namespace ssd_export {

// The parts of a head group's cache, in the order of a node's inputs and outputs.
enum CachePart { kPastKey, kPastValue, kPastPosition, kPastScore };

// A cache tensor of a layer.
struct CacheInput {
    int32_t group;
    CachePart part;
};

// The tensors of a node: those of its kind, then past_key, past_value, past_position and, where the
// group ranks by score, past_score of each group; outputs alike, with the present_* of each past_*.
class NodeTensors {
public:
    NodeTensors(NodeKind const& kind, AttentionFields const& fields);

    int32_t first_cache() const { return kind_.inputs.size; }
    int32_t num_inputs() const { return first_cache() + static_cast<int32_t>(caches_.size()); }
    int32_t num_outputs() const {
        return kind_.outputs.size + static_cast<int32_t>(caches_.size());
    }

    // The input whose memory an output is, -1 for those of the kind.
    int32_t aliased_input(int32_t output) const {
        int32_t const cache = output - kind_.outputs.size;
        return cache < 0 ? -1 : first_cache() + cache;
    }

    NodeKind const& kind() const { return kind_; }

    // The cache tensors, from input first_cache on.
    std::vector<CacheInput> const& caches() const { return caches_; }

    // The input of a part of a group; -1 where the group has none.
    int32_t input_of(int32_t group, CachePart part) const;

    // The dtype of input or output `place`, inputs first.
    nvinfer1::DataType type_of(int32_t place, nvinfer1::DataType data_type) const;

    // What messages call an input.
    std::string name_of(int32_t input) const;

    // Throws std::invalid_argument where a node has another number of inputs.
    void check_num_inputs(int32_t given) const;

private:
    NodeKind const& kind_;
    std::vector<CacheInput> caches_;
};

// Sizes of a launch. rows and num_places are -1 where they are not known yet.
struct LayerSizes {
    int64_t rows;
    int32_t num_places;  // of a window; 1 in a step
    int32_t num_heads;   // KV heads of all groups
    int32_t query_group_size;
    int32_t most_slots;
    int32_t kept_slots;  // most slots of a group that ranks by score
    OfGroups first_heads;
    OfGroups group_heads;
    OfGroups group_slots;
};

// The sizes in the shapes of a node's inputs, where dimensions that are not yet known are -1.
// Throws std::invalid_argument, saying what does not fit.
LayerSizes sizes_of(AttentionFields const& fields, NodeTensors const& tensors,
                    std::function<nvinfer1::Dims const&(int32_t input)> const& dims_of);

}  // namespace ssd_export
