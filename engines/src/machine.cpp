#include "machine.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

#include <sys/utsname.h>

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

uint64_t number_in(char const* file) {
    std::ifstream stream(file);
    uint64_t number = 0;
    return stream >> number ? number : 0;  // "max" is no number
}

}  // namespace

MachineMemory machine_memory() {
    MachineMemory memory{
        kilobytes_of("/proc/meminfo", "MemAvailable") + kilobytes_of("/proc/meminfo", "SwapFree"),
        kilobytes_of("/proc/meminfo", "MemTotal")};
    uint64_t const limit = number_in("/sys/fs/cgroup/memory.max");
    uint64_t const used = number_in("/sys/fs/cgroup/memory.current");
    if (limit > 0 && limit < memory.total_bytes) {
        memory.total_bytes = limit;
        memory.free_bytes = std::min(memory.free_bytes, limit - std::min(used, limit));
    }
    return memory;
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
