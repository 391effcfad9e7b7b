#pragma once

#include <cstdint>
#include <string>

namespace ssd_runtime {

// Memory of this machine, or of the process' control group where that has less; 0 where the system
// does not say.
struct MachineMemory {
    uint64_t free_bytes, total_bytes;
};
MachineMemory machine_memory();

// "Intel(R) Xeon(R) ...", or the architecture where the system does not say.
std::string processor_name();

}  // namespace ssd_runtime
