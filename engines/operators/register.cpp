// The entry point of libssd_export_operators.so, which a session of ONNX Runtime loads.
#include "layer_attention.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, OrtApiBase const* base) {
    OrtApi const* const api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
        return base->GetApi(1)->CreateStatus(
            ORT_NOT_IMPLEMENTED, "these operators were built for a newer version of ONNX Runtime");
    }
    Ort::InitApi(api);
    return ssd_operators::add_operators(options);
}
