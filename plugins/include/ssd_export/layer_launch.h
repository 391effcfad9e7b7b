#pragma once

#include <cstddef>

#include <cuda.h>

#include "ssd_export/attention_fields.h"
#include "ssd_export/kernel.h"
#include "ssd_export/layer_shapes.h"

namespace ssd_export {

// Bytes of workspace that steps of up to so many rows need, on any GPU.
size_t workspace_bytes(AttentionFields const& fields, LayerSizes const& most);

// Queues the attention of a step: one launch of the layer's kernel or, where rows x heads do not
// fill the GPU, one over parts of the slots and one that adds them up. Throws std::runtime_error
// where there is no workspace or the driver refuses.
//
// inputs: of the node; out: its first output; workspace: of workspace_bytes.
void launch_layer(AttentionFields const& fields, NodeTensors const& tensors,
                  LayerSizes const& sizes, LayerKernels const& kernels, void const* const* inputs,
                  void* out, void* workspace, CUstream stream);

}  // namespace ssd_export
