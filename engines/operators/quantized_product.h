// ssd_export::QuantizedMatMul: x float [..., depth] times a constant matrix in int4 or int8, plus a
// bias [width] where it has a fourth input. Codes are read where the weights file is mapped: uint8
// [depth, width / 2] of int4, int8 [depth, width]; scale float [depth / block, width] or [width].
// Activations are rounded to int8, block by block, as MatMulNBits does with accuracy level 4.
#pragma once

#include "custom_operator.h"

namespace ssd_operators {

OrtCustomOp const* quantized_product_operator();

}  // namespace ssd_operators
