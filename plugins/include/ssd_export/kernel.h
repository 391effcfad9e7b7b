#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <cuda.h>

#include "ssd_export/attention_fields.h"

namespace ssd_export {

// Programs of a launch: x for each head of each row, y for parts of its slots or for its queries.
struct Grid {
    int64_t x = 1;
    int32_t y = 1;
};

// A kernel image loaded into the current CUDA context; unloads when the last owner is gone.
class Kernel {
public:
    // An image in the current context, loaded at most once per context. Opens the CUDA driver.
    // Throws std::runtime_error where there is no driver, no GPU, or the image does not run on this
    // GPU.
    static std::shared_ptr<Kernel const> load(std::string const& image, std::string const& name,
                                              int32_t shared_bytes, int32_t num_warps);

    Kernel(Kernel const&) = delete;
    Kernel& operator=(Kernel const&) = delete;
    ~Kernel();

    // Starts the programs of a grid. Throws std::runtime_error where the driver refuses.
    void launch(Grid grid, void const* const* arguments, CUstream stream) const;

private:
    Kernel(CUcontext context, std::string const& image, std::string const& name,
           int32_t shared_bytes, int32_t num_warps);

    CUcontext context_;
    CUmodule module_ = nullptr;
    CUfunction function_ = nullptr;
    int32_t shared_bytes_;
    int32_t num_warps_;
};

// The kernels of a node in the current CUDA context, in the order of its kind, and how many
// multiprocessors its GPU has.
struct LayerKernels {
    // Throws as Kernel::load.
    static std::shared_ptr<LayerKernels const> load(AttentionFields const& fields);

    Kernel const& operator[](size_t place) const { return *kernels[place]; }

    std::vector<std::shared_ptr<Kernel const>> kernels;
    int32_t num_multiprocessors = 0;
};

}  // namespace ssd_export
