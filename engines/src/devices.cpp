#include <cstdio>
#include <cstring>

#include "backends.h"
#include "cuda_driver.h"
#include "devices.h"
#include "failure.h"
#include "model.h"

namespace ssd_runtime {

ssd_device new_device(char const* backend, char const* provider, int index) {
    ssd_device device{};
    device.struct_size = sizeof device;
    device.index = index;
    std::snprintf(device.backend, sizeof device.backend, "%s", backend);
    std::snprintf(device.provider, sizeof device.provider, "%s", provider);
    return device;
}

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

std::vector<ssd_device> list_devices() {
    std::vector<ssd_device> devices;
    for (BackendEntry const& backend : backends()) {
        backend.list(devices);
    }
    return devices;
}

}  // namespace ssd_runtime
