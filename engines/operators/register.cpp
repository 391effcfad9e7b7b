// The entry point of libssd_export_operators.so, which a session of ONNX Runtime loads.
#include "kernels.h"
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

// Writes Gumbel noise float32 [num_codes] of one step of an image, as ssd_export/noise.py defines
// it.
extern "C" __attribute__((visibility("default"))) void ssd_export_fill_noise(
    uint64_t seed, uint32_t image, uint32_t step, int64_t num_codes, float* noise) {
    ssd_operators::kernels().fill_noise(seed, image, step, num_codes, noise);
}
