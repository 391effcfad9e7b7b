#include "backends.h"

#include "devices.h"
#include "failure.h"
#ifdef SSD_HAS_ONNXRUNTIME
#include "ort/ort_runner.h"
#endif
#if defined(SSD_HAS_TENSORRT) || defined(SSD_HAS_TENSORRT_RTX)
#include "trt/trt_runner.h"
#endif

namespace ssd_runtime {
namespace {

#if defined(SSD_HAS_TENSORRT) || defined(SSD_HAS_TENSORRT_RTX)
template <Nvinfer const& (*open_library)()>
std::unique_ptr<Backend> open_trt(Bundle const& bundle, ModelRequest const& request) {
    return open_trt_backend(bundle, open_library, request.provider, request.device);
}

template <Nvinfer const& (*open_library)()>
void list_trt(char const* name, std::vector<ssd_device>& devices) {
    std::string lacks;
    try {
        open_library();
    } catch (Failure const& failure) {
        lacks = failure.what();
    }
    add_gpus(name, lacks, devices);
}
#endif

std::vector<BackendEntry> all() {
    return {
#ifdef SSD_HAS_ONNXRUNTIME
        {"onnxruntime",
         [](Bundle const& bundle, ModelRequest const& request) {
             return open_ort_backend(bundle, request.provider.empty() ? "cpu" : request.provider,
                                     request.device, request.num_threads);
         },
         list_ort_devices},
#endif
#ifdef SSD_HAS_TENSORRT
        {"tensorrt", open_trt<open_tensorrt>,
         [](std::vector<ssd_device>& devices) { list_trt<open_tensorrt>("tensorrt", devices); }},
#endif
#ifdef SSD_HAS_TENSORRT_RTX
        {"tensorrt-rtx", open_trt<open_tensorrt_rtx>,
         [](std::vector<ssd_device>& devices) {
             list_trt<open_tensorrt_rtx>("tensorrt-rtx", devices);
         }},
#endif
    };
}

}  // namespace

std::vector<BackendEntry> const& backends() {
    static std::vector<BackendEntry> const made = all();
    return made;
}

std::unique_ptr<Backend> open_backend(Bundle const& bundle, ModelRequest const& request) {
    std::string names;
    for (BackendEntry const& backend : backends()) {
        if (request.backend.empty() || request.backend == backend.name) {
            return backend.open(bundle, request);
        }
        names += (names.empty() ? "" : ", ") + std::string(backend.name);
    }
    fail(SSD_INVALID_ARGUMENT, "unknown backend ", in_quotes(request.backend), "; use ",
         backends().size() > 1 ? "one of " : "", names);
}

}  // namespace ssd_runtime
