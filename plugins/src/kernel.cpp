#include "ssd_export/kernel.h"

#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include <dlfcn.h>

// The name of a driver function as the library exports it; cuda.h maps some to a newer version
// ("cuModuleUnload_v2").
#define SSD_TEXT(name) #name
#define SSD_EXPORTED(name) SSD_TEXT(name)

namespace ssd_export {
namespace {

// The functions of the CUDA driver that a launch needs; opened on first use, so that the plugin
// loads, and engines are built, on machines without one.
struct Driver {
    decltype(&::cuInit) init_;
    decltype(&::cuGetErrorString) error_string_;
    decltype(&::cuCtxGetCurrent) current_context_;
    decltype(&::cuCtxPushCurrent) push_context_;
    decltype(&::cuCtxPopCurrent) pop_context_;
    decltype(&::cuCtxGetDevice) current_device_;
    decltype(&::cuDeviceGetAttribute) device_attribute_;
    decltype(&::cuModuleLoadData) load_module_;
    decltype(&::cuModuleUnload) unload_module_;
    decltype(&::cuModuleGetFunction) get_function_;
    decltype(&::cuLaunchKernel) launch_kernel_;

    static Driver const& get() {
        static Driver const driver;
        return driver;
    }

    void check(CUresult result, char const* doing) const {
        if (result == CUDA_SUCCESS) {
            return;
        }
        char const* reason = nullptr;
        error_string_(result, &reason);
        bool const is_foreign =
            result == CUDA_ERROR_NO_BINARY_FOR_GPU || result == CUDA_ERROR_INVALID_PTX ||
            result == CUDA_ERROR_UNSUPPORTED_PTX_VERSION || result == CUDA_ERROR_INVALID_IMAGE;
        throw std::runtime_error(
            std::string(doing) + ": " + (reason == nullptr ? "unknown error" : reason) +
            (is_foreign ? "; the engine carries a kernel for another GPU or a newer driver, build "
                          "it again for this machine"
                        : ""));
    }

private:
    Driver() : library_(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
        if (library_ == nullptr) {
            throw std::runtime_error(
                "libcuda.so.1 cannot be opened: this machine has no NVIDIA driver; engines can be "
                "built here, but not run");
        }
#define SSD_FUNCTION(member, name) \
    member = reinterpret_cast<decltype(member)>(symbol(SSD_EXPORTED(name)))
        SSD_FUNCTION(init_, cuInit);
        SSD_FUNCTION(error_string_, cuGetErrorString);
        SSD_FUNCTION(current_context_, cuCtxGetCurrent);
        SSD_FUNCTION(push_context_, cuCtxPushCurrent);
        SSD_FUNCTION(pop_context_, cuCtxPopCurrent);
        SSD_FUNCTION(current_device_, cuCtxGetDevice);
        SSD_FUNCTION(device_attribute_, cuDeviceGetAttribute);
        SSD_FUNCTION(load_module_, cuModuleLoadData);
        SSD_FUNCTION(unload_module_, cuModuleUnload);
        SSD_FUNCTION(get_function_, cuModuleGetFunction);
        SSD_FUNCTION(launch_kernel_, cuLaunchKernel);
#undef SSD_FUNCTION
        check(init_(0), "cuInit");
    }

    void* symbol(char const* name) const {
        void* address = dlsym(library_, name);
        if (address == nullptr) {
            throw std::runtime_error(std::string("libcuda.so.1 has no ") + name +
                                     "; update the NVIDIA driver");
        }
        return address;
    }

    void* library_;  // never closed: the driver outlives every plugin
};

using Key = std::pair<CUcontext, std::string>;

std::mutex loaded_mutex;

// Leaked on purpose: plugins may be destroyed after the library's own static objects.
std::map<Key, std::weak_ptr<Kernel const>>& loaded() {
    static auto* kernels = new std::map<Key, std::weak_ptr<Kernel const>>;
    return *kernels;
}

}  // namespace

std::shared_ptr<Kernel const> Kernel::load(std::string const& image, std::string const& name,
                                           int32_t shared_bytes, int32_t num_warps) {
    Driver const& driver = Driver::get();
    CUcontext context = nullptr;
    driver.check(driver.current_context_(&context), "cuCtxGetCurrent");
    if (context == nullptr) {
        throw std::runtime_error(
            "no CUDA context is current on this thread; call cudaSetDevice before TensorRT");
    }
    std::lock_guard<std::mutex> const lock(loaded_mutex);
    std::weak_ptr<Kernel const>& place = loaded()[Key(context, image)];
    std::shared_ptr<Kernel const> kernel = place.lock();
    if (kernel == nullptr) {
        kernel.reset(new Kernel(context, image, name, shared_bytes, num_warps));
        place = kernel;
    }
    return kernel;
}

Kernel::Kernel(CUcontext context, std::string const& image, std::string const& name,
               int32_t shared_bytes, int32_t num_warps)
    : context_(context), shared_bytes_(shared_bytes), num_warps_(num_warps) {
    Driver const& driver = Driver::get();
    driver.check(driver.load_module_(&module_, image.c_str()), "cuModuleLoadData");
    CUresult const found = driver.get_function_(&function_, module_, name.c_str());
    if (found != CUDA_SUCCESS) {
        driver.unload_module_(module_);
        driver.check(found, "cuModuleGetFunction");
    }
}

Kernel::~Kernel() {
    // A context that is gone has taken the module along; the driver then refuses the push.
    Driver const& driver = Driver::get();
    if (driver.push_context_(context_) == CUDA_SUCCESS) {
        CUcontext popped = nullptr;
        driver.unload_module_(module_);
        driver.pop_context_(&popped);
    }
}

void Kernel::launch(Grid grid, void const* const* arguments, CUstream stream) const {
    if (grid.x > std::numeric_limits<int32_t>::max()) {
        throw std::runtime_error("rows x heads = " + std::to_string(grid.x) +
                                 " is more than one launch holds");
    }
    Driver const& driver = Driver::get();
    driver.check(driver.launch_kernel_(function_, static_cast<unsigned>(grid.x),
                                       static_cast<unsigned>(grid.y), 1,
                                       static_cast<unsigned>(32 * num_warps_), 1, 1,
                                       static_cast<unsigned>(shared_bytes_), stream,
                                       const_cast<void**>(arguments), nullptr),
                 "cuLaunchKernel");
}

std::shared_ptr<LayerKernels const> LayerKernels::load(AttentionFields const& fields) {
    LayerKernels loaded;
    for (KernelFields const& kernel : fields.kernels) {
        loaded.kernels.push_back(
            Kernel::load(kernel.image, kernel.name, kernel.shared_bytes, fields.kernel_num_warps));
    }
    Driver const& driver = Driver::get();
    CUdevice device = 0;
    driver.check(driver.current_device_(&device), "cuCtxGetDevice");
    driver.check(driver.device_attribute_(&loaded.num_multiprocessors,
                                          CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device),
                 "cuDeviceGetAttribute");
    return std::make_shared<LayerKernels const>(std::move(loaded));
}

}  // namespace ssd_export
