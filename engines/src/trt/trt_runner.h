#pragma once

#include <memory>

#include "bundle.h"
#include "runner.h"
#include "ssd_runtime/ssd_runtime.h"
#include "trt/nvinfer.h"

namespace ssd_runtime {

// The engines of a bundle on a GPU as a backend. open_library: TensorRT or TensorRT-RTX. Throws
// Failure, one line, for no GPU, no TensorRT, no engines or none that fit.
std::unique_ptr<Backend> open_trt_backend(Bundle const& bundle, Nvinfer const& (*open_library)(),
                                          std::string const& provider, int device);

}  // namespace ssd_runtime
