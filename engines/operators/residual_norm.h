// What stands between two convolutions of the image decoder, as one operator (residual_norm.cpp).
#pragma once

#include "custom_operator.h"

namespace ssd_operators {

// ssd_export::ResidualNorm, whose result is float32.
OrtCustomOp const* residual_norm_operator();

// ssd_export::ResidualNormQuantize, whose result is uint8.
OrtCustomOp const* residual_norm_quantize_operator();

}  // namespace ssd_operators
