#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ssd_runtime {

// The few calls of the CUDA driver that this library makes. The driver is opened when it is first
// needed, so the library builds and loads on machines without one.
class CudaDriver {
public:
    // Throws Failure SSD_UNAVAILABLE where there is no driver or no GPU.
    static CudaDriver const& get();

    int num_devices() const;
    std::string name(int device) const;
    int compute_capability(int device) const;  // times ten
    // Makes the device's primary context, which ONNX Runtime and TensorRT use too, current on this
    // thread, and keeps it.
    void use(int device) const;
    void memory_bytes(uint64_t& free, uint64_t& total) const;
    void copy_to_device(void* target, void const* source, size_t num_bytes) const;
    void copy_to_host(void* target, void const* source, size_t num_bytes) const;

private:
    CudaDriver();
    void check(int result, char const* doing) const;

    using Pointer = unsigned long long;
    void* library_;  // never closed: the driver outlives every handle
    int (*init_)(unsigned);
    int (*error_string_)(int, char const**);
    int (*device_count_)(int*);
    int (*device_get_)(int*, int);
    int (*device_name_)(char*, int, int);
    int (*device_attribute_)(int*, int, int);
    int (*retain_context_)(void**, int);
    int (*set_context_)(void*);
    int (*memory_info_)(size_t*, size_t*);
    int (*to_device_)(Pointer, void const*, size_t);
    int (*to_host_)(void*, Pointer, size_t);
};

}  // namespace ssd_runtime
