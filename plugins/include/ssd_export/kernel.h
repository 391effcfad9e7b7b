#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <cuda.h>

#include "ssd_export/attention_fields.h"

namespace ssd_export {

// A kernel image loaded into the current CUDA context; unloads when the last owner is gone.
class Kernel {
public:
    // The image of these fields in the current context, loaded at most once per context. Opens the
    // CUDA driver. Throws std::runtime_error where there is no driver, no GPU, or the image does
    // not run on this GPU.
    static std::shared_ptr<Kernel const> load(AttentionFields const& fields);

    Kernel(Kernel const&) = delete;
    Kernel& operator=(Kernel const&) = delete;
    ~Kernel();

    // Starts num_programs programs of num_warps warps. Throws std::runtime_error where the driver
    // refuses.
    void launch(int64_t num_programs, AttentionFields const& fields, void const* const* arguments,
                CUstream stream) const;

private:
    Kernel(CUcontext context, AttentionFields const& fields);

    CUcontext context_;
    CUmodule module_ = nullptr;
    CUfunction function_ = nullptr;
};

}  // namespace ssd_export
