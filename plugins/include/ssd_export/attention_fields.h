#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "ssd_export/node_kind.h"

namespace ssd_export {

constexpr int32_t kMaxGroups = 3;  // head groups of a layer

// A number for each head group; those of groups that a layer has not got are never read.
using OfGroups = std::array<int32_t, kMaxGroups>;

// A kernel that a node carries: cubin, PTX or fatbin, entry point and shared memory.
struct KernelFields {
    std::string image;
    std::string name;
    int32_t shared_bytes = 0;
};

// What a node says about the head groups of its layer (rules R1 to R9:
// ssd_export/policy/__init__.py) and about the kernels that serve it. Tables in
// attention_fields.cpp and node_kind.cpp name the fields.
struct AttentionFields {
    int32_t num_groups = 0;
    OfGroups num_sinks{};
    OfGroups num_recent{};
    OfGroups by_score{};
    OfGroups pinned_columns{};  // bit c: column c of the grid
    OfGroups age_quota{};
    OfGroups evict_every{};
    int32_t grid_width = 0;
    float score_decay = 0;
    std::string kernel_dtype;  // float16, bfloat16 or float32
    int32_t kernel_head_dim = 0;
    int32_t kernel_max_slots = 0;
    int32_t kernel_block_slots = 0;
    int32_t kernel_max_splits = 0;
    int32_t kernel_num_warps = 0;
    std::vector<KernelFields> kernels;  // in the order of the node's kind

    // The dtype of queries, keys and values.
    nvinfer1::DataType data_type() const;

    // Bytes of one of their numbers.
    int32_t element_bytes() const;

    // Whether any group ranks by score.
    bool has_scores() const;
};

// Names and types of all fields, without data: what the ONNX parser looks for in a node.
std::vector<nvinfer1::PluginField> field_names(NodeKind const& kind);

// All fields with their data, which stays where it is in `fields`.
std::vector<nvinfer1::PluginField> fields_to_serialize(NodeKind const& kind,
                                                       AttentionFields const& fields);

// The fields of a node or of a serialized plugin. Throws std::invalid_argument, saying what is
// wrong and the fix.
AttentionFields read_fields(NodeKind const& kind,
                            nvinfer1::PluginFieldCollection const& collection);

}  // namespace ssd_export
