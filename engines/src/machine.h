#pragma once

#include <cstdint>
#include <string>

namespace ssd_runtime {

// Memory and swap that can be had now, and memory of this machine, within every limit of the
// process's control groups and `ulimit -v`; 0 where the system does not say. root: of the file
// system, as in cgroups.h.
struct MachineMemory {
    uint64_t free_bytes, total_bytes;
};
MachineMemory machine_memory(std::string const& root = "");

// CPUs that this process may run on, by its affinity; and CPUs of the machine.
int cpus_of_affinity();
int cpus_of_machine();

// CPUs that this process may keep busy: of so many, those that the quotas of its control groups
// leave, at least 1. A quota of 1.5 counts as 1: a second thread would be stopped half of the time,
// with the first one waiting for it.
int cpus_within_quota(int cpus, std::string const& root = "");
inline int num_cpus() { return cpus_within_quota(cpus_of_affinity()); }

// Threads for a library that knows of no quota; 0, the library's own choice, where nothing limits
// this process. cpus: that it may keep busy; all: of the machine.
inline int thread_limit(int cpus, int all) { return cpus >= all ? 0 : cpus; }

// Whether products of uint8 and int8 are summed without saturating at 16 bits, as x86 did before
// VNNI; false where the system does not say. root: of the file system, as above.
bool multiplies_int8_exactly(std::string const& root = "");

// "Intel(R) Xeon(R) ...", or the architecture where the system does not say.
std::string processor_name();

}  // namespace ssd_runtime
