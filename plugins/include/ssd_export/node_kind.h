#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda.h>

namespace ssd_export {

struct AttentionFields;
struct LayerKernels;
struct LayerSizes;
class NodeTensors;

// A constant array and its length.
template <typename Row>
struct Table {
    Row const* rows;
    int32_t size;

    constexpr Row const* begin() const { return rows; }
    constexpr Row const* end() const { return rows + size; }
    constexpr Row const& operator[](int32_t place) const { return rows[place]; }
};

template <typename Row, int32_t kSize>
constexpr Table<Row> table_of(Row const (&rows)[kSize]) {
    return {rows, kSize};
}

// Type and shape of a tensor beside the caches, in a node that has places of a window.
enum class TensorForm {
    kHeads,    // dtype of the model [rows, query heads + 2 KV heads, places, head_dim]
    kOut,      // dtype of the model [rows, query heads, places, head_dim]
    kOfRows,   // int32 [rows]
    kLogits,   // float32 [rows, query heads, places, slots of the largest ranked group + places]
    kOfQuery,  // float32 [rows, query heads, places]
};

struct TokenTensor {
    char const* name;
    TensorForm form;
};

// Names of the fields of a kernel that a node carries.
struct KernelNames {
    char const* image;
    char const* name;
    char const* shared_bytes;
};

// What one enqueue is given. sizes: of this run; outputs: of the node; workspace: as much as the
// kind asked for.
struct Launch {
    AttentionFields const& fields;
    NodeTensors const& tensors;
    LayerSizes const& sizes;
    LayerKernels const& kernels;
    void const* const* inputs;
    void* const* outputs;
    void* workspace;
    CUstream stream;
};

// A kind of node, the attention of a layer (contracts: ssd_export/export/plugin_flavor.py).
struct NodeKind {
    char const* name;
    char const* version;
    bool has_places;             // tokens of a window in each row, not one token
    Table<TokenTensor> inputs;   // before the caches
    Table<TokenTensor> outputs;  // alike; then each cache, in the memory of its input
    Table<KernelNames> kernels;
    // Bytes of workspace that runs of up to these sizes need, on any GPU.
    size_t (*workspace_bytes)(AttentionFields const& fields, LayerSizes const& most);
    // Queues the kernels. Throws std::runtime_error where there is no workspace or the driver
    // refuses.
    void (*launch)(Launch const& launch);
};

constexpr char kPluginNamespace[] = "ssd_export";

// Places of inputs in all kinds, of prompt_length where there are evictions, and of what a window
// takes beside them.
constexpr int32_t kHeads = 0, kPosition = 1, kPromptLength = 2;
constexpr int32_t kActive = 3;
constexpr int32_t kCounts = 2, kLogits = 3, kLargest = 4, kTotal = 5;

// One token a row: R3 to R7 of a decode step.
extern NodeKind const kDecodeAttention;
// A window: evicts for its first token, then attends; caches keep their tokens.
extern NodeKind const kWindowAttention;
// The same window afterwards: writes the tokens that count and adds what their queries gave.
extern NodeKind const kWindowSettle;

}  // namespace ssd_export
