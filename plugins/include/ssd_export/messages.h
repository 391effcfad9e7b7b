#pragma once

#include <string>

#include <NvInferRuntime.h>

namespace ssd_export {

// Remembers where TensorRT keeps its logger.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// One line to TensorRT's logger, or to stderr before there is one. Never throws.
void report_error(std::string const& message) noexcept;

}  // namespace ssd_export
