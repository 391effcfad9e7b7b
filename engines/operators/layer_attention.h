// ssd_export::LayerAttention for ONNX Runtime on the CPU.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

namespace ssd_operators {

// Adds the domain ssd_export with its operators to the options of a session; Ort::InitApi was
// called. Null where it worked.
OrtStatus* add_operators(OrtSessionOptions* options);

}  // namespace ssd_operators
