#include "cuda_driver.h"

#include <dlfcn.h>

#include "failure.h"

namespace ssd_runtime {
namespace {

char const no_gpu[] =
    "this machine has no NVIDIA GPU, or no driver for it; use the backend onnxruntime with the "
    "provider cpu, which needs neither";
constexpr int capability_major = 75, capability_minor = 76;  // CUdevice_attribute

template <typename Function>
void find(void* library, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) {
        fail(SSD_UNAVAILABLE, "libcuda.so.1 has no ", name, "; update the NVIDIA driver");
    }
}

}  // namespace

CudaDriver const& CudaDriver::get() {
    static CudaDriver const driver;
    return driver;
}

CudaDriver::CudaDriver() : library_(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) {
        fail(SSD_UNAVAILABLE, no_gpu);
    }
    find(library_, "cuInit", init_);
    find(library_, "cuGetErrorString", error_string_);
    find(library_, "cuDeviceGetCount", device_count_);
    find(library_, "cuDeviceGet", device_get_);
    find(library_, "cuDeviceGetName", device_name_);
    find(library_, "cuDeviceGetAttribute", device_attribute_);
    find(library_, "cuDevicePrimaryCtxRetain", retain_context_);
    find(library_, "cuCtxSetCurrent", set_context_);
    find(library_, "cuMemGetInfo_v2", memory_info_);
    find(library_, "cuMemcpyHtoD_v2", to_device_);
    find(library_, "cuMemcpyDtoH_v2", to_host_);
    try {
        check(init_(0), "cuInit");
    } catch (Failure const& failure) {
        fail(SSD_UNAVAILABLE, no_gpu, " (", failure.what(), ")");
    }
}

void CudaDriver::check(int result, char const* doing) const {
    if (result != 0) {
        char const* reason = nullptr;
        error_string_(result, &reason);
        fail(SSD_UNAVAILABLE, doing, ": ", reason == nullptr ? "unknown error" : reason,
             "; nvidia-smi shows whether GPU and driver work");
    }
}

int CudaDriver::num_devices() const {
    int count = 0;
    check(device_count_(&count), "cuDeviceGetCount");
    return count;
}

std::string CudaDriver::name(int device) const {
    char name[128] = {};
    check(device_name_(name, sizeof name - 1, device), "cuDeviceGetName");
    return name;
}

int CudaDriver::compute_capability(int device) const {
    int major = 0;
    int minor = 0;
    check(device_attribute_(&major, capability_major, device), "cuDeviceGetAttribute");
    check(device_attribute_(&minor, capability_minor, device), "cuDeviceGetAttribute");
    return 10 * major + minor;
}

void CudaDriver::use(int device) const {
    if (device < 0 || device >= num_devices()) {
        fail(SSD_INVALID_ARGUMENT, "device ", device, " is not one of the ", num_devices(),
             " GPUs of this machine; ssd_devices lists them");
    }
    int handle = 0;
    void* context = nullptr;
    check(device_get_(&handle, device), "cuDeviceGet");
    check(retain_context_(&context, handle), "cuDevicePrimaryCtxRetain");
    check(set_context_(context), "cuCtxSetCurrent");
}

void CudaDriver::memory_bytes(uint64_t& free, uint64_t& total) const {
    size_t free_now = 0;
    size_t all = 0;
    check(memory_info_(&free_now, &all), "cuMemGetInfo");
    free = free_now;
    total = all;
}

void CudaDriver::copy_to_device(void* target, void const* source, size_t num_bytes) const {
    check(to_device_(reinterpret_cast<Pointer>(target), source, num_bytes), "cuMemcpyHtoD");
}

void CudaDriver::copy_to_host(void* target, void const* source, size_t num_bytes) const {
    check(to_host_(target, reinterpret_cast<Pointer>(source), num_bytes), "cuMemcpyDtoH");
}

}  // namespace ssd_runtime
