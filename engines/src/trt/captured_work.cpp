#include "trt/captured_work.h"

#include "failure.h"

namespace ssd_runtime {

void CapturedWork::launch() {
    if (captures_ && graph_ == nullptr) {
        try {
            graph_ = std::make_unique<DeviceQueue::Graph>(queue_, work_);
        } catch (Failure const&) {
            captures_ = false;  // ssd_cache_report.step_is_captured tells
        }
    }
    if (graph_ != nullptr) {
        graph_->launch();
    } else {
        work_();
    }
}

}  // namespace ssd_runtime
