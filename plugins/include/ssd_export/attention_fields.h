#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

namespace ssd_export {

constexpr int32_t kMaxGroups = 3;  // head groups of a layer

// A number for each head group; those of groups that a layer has not got are never read.
using OfGroups = std::array<int32_t, kMaxGroups>;

// What a DecodeAttention node says about the head groups of its layer (rules R1 to R9:
// ssd_export/policy/__init__.py) and about the kernels that serve it. One table in
// attention_fields.cpp names, reads, checks and serializes the fields.
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
    // Cubin, PTX or fatbin, entry point and shared memory of each kernel: of a layer; of a part of
    // the slots of its heads; of the sum of the parts.
    std::string kernel_layer_image;
    std::string kernel_layer_name;
    int32_t kernel_layer_shared_bytes = 0;
    std::string kernel_part_image;
    std::string kernel_part_name;
    int32_t kernel_part_shared_bytes = 0;
    std::string kernel_sum_image;
    std::string kernel_sum_name;
    int32_t kernel_sum_shared_bytes = 0;

    // The dtype of queries, keys and values.
    nvinfer1::DataType data_type() const;

    // Bytes of one of their numbers.
    int32_t element_bytes() const;

    // Whether any group ranks by score.
    bool has_scores() const;
};

// Names and types of all fields, without data: what the ONNX parser looks for in a node.
std::vector<nvinfer1::PluginField> field_names();

// All fields with their data, which stays where it is in `fields`.
std::vector<nvinfer1::PluginField> fields_to_serialize(AttentionFields const& fields);

// The fields of a node or of a serialized plugin. Throws std::invalid_argument, saying what is
// wrong and the fix.
AttentionFields read_fields(nvinfer1::PluginFieldCollection const& collection);

}  // namespace ssd_export
