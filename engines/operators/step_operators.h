// What a step has between its products and attention, each as one operator.
#pragma once

#include "custom_operator.h"

namespace ssd_operators {

// ssd_export::GatedSilu: gate_up [..., 2 size] -> silu(gate) * up [..., size].
OrtCustomOp const* gated_silu_operator();

// ssd_export::DrawToken: logits [2 N or N, V] of images with guidance or without, noise [R, N, V],
// of which step s reads row s mod R, step int64 [1], cfg_scale and temperature [N] -> int32 [N], as
// ssd_export/export/sampler.py draws them.
OrtCustomOp const* draw_token_operator();

}  // namespace ssd_operators
