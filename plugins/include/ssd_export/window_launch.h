#pragma once

#include <cstddef>

#include "ssd_export/node_kind.h"

namespace ssd_export {

// 0: what a window keeps for its end are outputs of its node.
size_t no_workspace_bytes(AttentionFields const& fields, LayerSizes const& most);

// Queues an eviction in the full heads of active rows, then the attention of every place of the
// window. Throws std::runtime_error where the driver refuses.
void launch_window(Launch const& launch);

// Queues what writes the tokens that count. Throws as launch_window.
void launch_settle(Launch const& launch);

}  // namespace ssd_export
