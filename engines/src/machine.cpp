#include "machine.h"

#include <algorithm>
#include <fstream>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <sched.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "cgroups.h"

namespace ssd_runtime {
namespace {

// The number after "name:" in a file such as /proc/meminfo, in bytes; 0 where there is none.
uint64_t kilobytes_of(std::string const& file, std::string const& name) {
    std::ifstream stream(file);
    for (std::string line; std::getline(stream, line);) {
        if (line.rfind(name + ":", 0) == 0) {
            std::istringstream rest(line.substr(name.size() + 1));
            uint64_t kilobytes = 0;
            return rest >> kilobytes ? kilobytes * 1024 : 0;
        }
    }
    return 0;
}

// What is left of `ulimit -v`; none where there is no such limit.
std::optional<MemoryLimit> address_space() {
    rlimit limit{};
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
        return std::nullopt;
    }
    std::ifstream stream("/proc/self/statm");
    uint64_t pages = 0;
    stream >> pages;
    uint64_t const used = pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return MemoryLimit{limit.rlim_cur, limit.rlim_cur - std::min<uint64_t>(used, limit.rlim_cur)};
}

}  // namespace

MachineMemory machine_memory(std::string const& root) {
    std::string const meminfo = root + "/proc/meminfo";
    uint64_t const swap = kilobytes_of(meminfo, "SwapFree");
    MachineMemory memory{kilobytes_of(meminfo, "MemAvailable") + swap,
                         kilobytes_of(meminfo, "MemTotal")};
    std::vector<MemoryLimit> limits = memory_limits(root, swap);
    if (std::optional<MemoryLimit> const limit = address_space()) {
        limits.push_back(*limit);
    }
    for (MemoryLimit const& limit : limits) {
        memory.total_bytes = std::min(memory.total_bytes, limit.limit);
        memory.free_bytes = std::min(memory.free_bytes, limit.free);
    }
    return memory;
}

int cpus_of_affinity() {
    for (int most = 1024; most <= 1 << 20; most *= 2) {  // what the kernel knows may not fit
        std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> const set(
            CPU_ALLOC(most), [](cpu_set_t* allocated) { CPU_FREE(allocated); });
        size_t const size = CPU_ALLOC_SIZE(most);
        if (set != nullptr && sched_getaffinity(0, size, set.get()) == 0) {
            return std::max(CPU_COUNT_S(size, set.get()), 1);
        }
    }
    return cpus_of_machine();
}

int cpus_of_machine() { return static_cast<int>(std::max(sysconf(_SC_NPROCESSORS_ONLN), 1L)); }

int cpus_within_quota(int cpus, std::string const& root) {
    for (double const quota : cpu_quotas(root)) {
        cpus = quota < cpus ? static_cast<int>(quota) : cpus;
    }
    return std::max(cpus, 1);
}

bool multiplies_int8_exactly(std::string const& root) {
#if defined(__aarch64__)
    (void)root;
    return true;
#else
    std::ifstream stream(root + "/proc/cpuinfo");
    for (std::string line; std::getline(stream, line);) {
        size_t const colon = line.find(':');
        if (line.rfind("flags", 0) == 0 && colon != std::string::npos) {
            std::istringstream flags(line.substr(colon + 1));
            for (std::string flag; flags >> flag;) {
                if (flag == "avx512_vnni" || flag == "avx_vnni") {
                    return true;
                }
            }
            return false;
        }
    }
    return false;
#endif
}

std::string processor_name() {
    std::ifstream stream("/proc/cpuinfo");
    for (std::string line; std::getline(stream, line);) {
        size_t const colon = line.find(": ");
        if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
            return line.substr(colon + 2);
        }
    }
    utsname system{};
    return uname(&system) == 0 ? system.machine : "unknown";
}

}  // namespace ssd_runtime
