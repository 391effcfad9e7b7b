#include "ssd_export/messages.h"

#include <atomic>
#include <cstdio>

namespace ssd_export {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void report_error(std::string const& message) noexcept {
    nvinfer1::ILoggerFinder* finder = logger_finder;
    nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger == nullptr) {
        std::fprintf(stderr, "DecodeAttention: %s\n", message.c_str());
        return;
    }
    try {
        logger->log(nvinfer1::ILogger::Severity::kERROR, ("DecodeAttention: " + message).c_str());
    } catch (...) {  // no memory for the text: nothing left to say it with
    }
}

}  // namespace ssd_export
