// ssd_export::PackedMatMul: x float [..., depth] times a constant matrix [depth, width], plus a
// bias [width] where it has a third input. The matrix is held in two bytes a number where these
// have every bit of it, as those of a checkpoint in float16 or bfloat16 do.
#pragma once

#include "custom_operator.h"

namespace ssd_operators {

OrtCustomOp const* packed_product_operator();

}  // namespace ssd_operators
