#pragma once

#include <cstddef>

#include "ssd_export/node_kind.h"

namespace ssd_export {

// Bytes of workspace that steps of up to so many rows need, on any GPU.
size_t layer_workspace_bytes(AttentionFields const& fields, LayerSizes const& most);

// Queues the attention of a step: one launch of the layer's kernel or, where rows x heads do not
// fill the GPU, one over parts of the slots and one that adds them up. Throws std::runtime_error
// where there is no workspace or the driver refuses.
void launch_layer(Launch const& launch);

}  // namespace ssd_export
