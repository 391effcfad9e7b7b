#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda_driver.h"
#include "failure.h"
#include "machine.h"
#include "model.h"
#include "ort/ort_api.h"

namespace ssd_runtime {
namespace {

ssd_device new_device(char const* backend, char const* provider, int index) {
    ssd_device device{};
    device.struct_size = sizeof device;
    device.index = index;
    std::snprintf(device.backend, sizeof device.backend, "%s", backend);
    std::snprintf(device.provider, sizeof device.provider, "%s", provider);
    return device;
}

template <size_t Size>
void set(char (&target)[Size], std::string const& source) {
    std::snprintf(target, Size, "%s", source.c_str());
}

// Every GPU for a backend, or one entry that says why there is none.
void add_gpus(char const* backend, std::string const& lacks, std::vector<ssd_device>& devices) {
    try {
        CudaDriver const& driver = CudaDriver::get();
        int const count = driver.num_devices();
        for (int index = 0; index < count; ++index) {
            ssd_device device = new_device(backend, "cuda", index);
            set(device.name, driver.name(index));
            driver.use(index);
            driver.memory_bytes(device.free_bytes, device.total_bytes);
            device.available = lacks.empty() ? 1 : 0;
            set(device.reason, lacks);
            devices.push_back(device);
        }
        if (count > 0) {
            return;
        }
        fail(SSD_UNAVAILABLE, "this machine has no NVIDIA GPU");
    } catch (Failure const& failure) {
        ssd_device device = new_device(backend, "cuda", 0);
        set(device.reason, lacks.empty() ? failure.what() : lacks);
        devices.push_back(device);
    }
}

void add_ort(std::vector<ssd_device>& devices) {
    ssd_device cpu = new_device("onnxruntime", "cpu", 0);
    MachineMemory const memory = machine_memory();
    set(cpu.name, processor_name());
    cpu.total_bytes = memory.total_bytes;
    cpu.free_bytes = memory.free_bytes;
    std::string lacks;
    try {
        need_ort_api();
        cpu.available = 1;
        std::vector<std::string> const providers = Ort::GetAvailableProviders();
        if (std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") ==
            providers.end()) {
            lacks = "this onnxruntime has no CUDAExecutionProvider; install one for GPUs";
        }
    } catch (Failure const& failure) {
        lacks = failure.what();
        set(cpu.reason, lacks);
    }
    devices.push_back(cpu);
    add_gpus("onnxruntime", lacks, devices);
}

}  // namespace

std::vector<ssd_device> list_devices() {
    std::vector<ssd_device> devices;
    add_ort(devices);
    return devices;
}

}  // namespace ssd_runtime
