// Prints what the library reads of a machine: `ssd_machine ROOT AFFINITY CPUS`, the root of its
// file system, and how many CPUs the process may run on and the machine has. Last, whether it
// multiplies int8 exactly.
#include <cstdio>
#include <cstdlib>

#include "cgroups.h"
#include "machine.h"

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: ssd_machine ROOT AFFINITY CPUS\n");
        return 2;
    }
    char const* const root = argv[1];
    ssd_runtime::MachineMemory const memory = ssd_runtime::machine_memory(root);
    int const cpus = ssd_runtime::cpus_within_quota(std::atoi(argv[2]), root);
    std::printf("%llu %llu %d %d", static_cast<unsigned long long>(memory.free_bytes),
                static_cast<unsigned long long>(memory.total_bytes), cpus,
                ssd_runtime::thread_limit(cpus, std::atoi(argv[3])));
    for (double const quota : ssd_runtime::cpu_quotas(root)) {
        std::printf(" %.17g", quota);
    }
    std::printf("\n%d %d\n", ssd_runtime::cpus_of_affinity(), ssd_runtime::cpus_of_machine());
    std::printf("%d\n", ssd_runtime::multiplies_int8_exactly(root) ? 1 : 0);
}
