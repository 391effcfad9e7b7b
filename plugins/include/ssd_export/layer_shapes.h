#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "ssd_export/attention_fields.h"

namespace ssd_export {

// The parts of a head group's cache, in the order of a node's inputs and outputs.
enum CachePart { kPastKey, kPastValue, kPastPosition, kPastScore };

// A cache tensor of a layer.
struct CacheInput {
    int32_t group;
    CachePart part;
};

// Inputs of a node: heads (queries, keys and values of all groups), position, prompt_length, then
// past_key, past_value, past_position and, where the group ranks by score, past_score of each
// group. Outputs: out, then the present_* of each past_*.
class NodeTensors {
public:
    static constexpr int32_t kHeads = 0, kPosition = 1, kPromptLength = 2, kFirstCache = 3;

    explicit NodeTensors(AttentionFields const& fields);

    int32_t num_inputs() const { return kFirstCache + static_cast<int32_t>(caches_.size()); }
    int32_t num_outputs() const { return 1 + static_cast<int32_t>(caches_.size()); }

    // The input whose memory an output is, -1 for out.
    static int32_t aliased_input(int32_t output) {
        return output == 0 ? -1 : kFirstCache + output - 1;
    }

    // The cache tensors, from input kFirstCache on.
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
    std::vector<CacheInput> caches_;
};

// Sizes of a launch. rows is -1 where it is not known yet.
struct LayerSizes {
    int64_t rows;
    int32_t num_heads;  // KV heads of all groups
    int32_t query_group_size;
    int32_t most_slots;
    OfGroups first_heads;
    OfGroups group_heads;
    OfGroups group_slots;
};

// The sizes in the shapes of a node's inputs, where dimensions that are not yet known are -1.
// Throws std::invalid_argument, saying what does not fit.
LayerSizes sizes_of(AttentionFields const& fields, NodeTensors const& tensors,
                    std::function<nvinfer1::Dims const&(int32_t input)> const& dims_of);

}  // namespace ssd_export
