#pragma once

// The C++ interface of ONNX Runtime without its static initializer: the library that is there is
// asked for its version first, so that one that is too old becomes a sentence.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include "config.h"

namespace ssd_runtime {

// Throws Failure SSD_UNAVAILABLE where the ONNX Runtime that was loaded is older than the headers.
void need_ort_api();

ONNXTensorElementDataType ort_type(Dtype dtype);

}  // namespace ssd_runtime
