// The operators of ssd_export for ONNX Runtime on the CPU; ssd_export::LayerAttention among them.
#pragma once

#include "custom_operator.h"

namespace ssd_operators {

// Adds the domain ssd_export with its operators to the options of a session; Ort::InitApi was
// called. Null where it worked.
OrtStatus* add_operators(OrtSessionOptions* options);

}  // namespace ssd_operators
