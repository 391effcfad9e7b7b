#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ssd_runtime {

// Limits that Linux control groups of both versions set on this process, by its own group and every
// parent of it, as ssd_export/cgroups.py reads them. root: of the file system, "" for the real one;
// tests give a folder.

// limit: bytes; free: what of it can still be had, clean page cache and swap that is left included.
struct MemoryLimit {
    uint64_t limit, free;
};

// swap_free: bytes of swap that the machine has left.
std::vector<MemoryLimit> memory_limits(std::string const& root, uint64_t swap_free);

// CPUs' worth of time of every limit: 1.5 is a half more than one CPU.
std::vector<double> cpu_quotas(std::string const& root);

}  // namespace ssd_runtime
