#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

namespace ssd_export {

// What a DecodeAttention node says about its head group (rules R1 to R9:
// ssd_export/policy/__init__.py) and about the kernel that serves it. One table in
// attention_fields.cpp names, reads, checks and serializes the fields.
struct AttentionFields {
    int32_t num_sinks = 0;
    int32_t num_recent = 0;
    int32_t by_score = 0;
    int32_t pinned_columns = 0;  // bit c: column c of the grid
    int32_t grid_width = 0;
    int32_t age_quota = 0;
    int32_t evict_every = 0;
    float score_decay = 0;
    std::string kernel_image;  // cubin, PTX or fatbin
    std::string kernel_name;
    std::string kernel_dtype;  // float16, bfloat16 or float32
    int32_t kernel_head_dim = 0;
    int32_t kernel_max_slots = 0;
    int32_t kernel_num_warps = 0;
    int32_t kernel_shared_bytes = 0;

    // The dtype of queries, keys and values.
    nvinfer1::DataType data_type() const;
};

// Names and types of all fields, without data: what the ONNX parser looks for in a node.
std::vector<nvinfer1::PluginField> field_names();

// All fields with their data, which stays where it is in `fields`.
std::vector<nvinfer1::PluginField> fields_to_serialize(AttentionFields const& fields);

// The fields of a node or of a serialized plugin. Throws std::invalid_argument, saying what is
// wrong and the fix.
AttentionFields read_fields(nvinfer1::PluginFieldCollection const& collection);

}  // namespace ssd_export
