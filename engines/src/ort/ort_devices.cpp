#include <algorithm>
#include <string>
#include <vector>

#include "devices.h"
#include "failure.h"
#include "machine.h"
#include "ort/ort_api.h"
#include "ort/ort_runner.h"

namespace ssd_runtime {

void list_ort_devices(std::vector<ssd_device>& devices) {
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

}  // namespace ssd_runtime
