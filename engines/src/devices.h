#pragma once

#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

#include "ssd_runtime/ssd_runtime.h"

namespace ssd_runtime {

ssd_device new_device(char const* backend, char const* provider, int index);

// Every GPU for a backend, or one entry that says why there is none. lacks: what this library lacks
// to use them; empty: nothing.
void add_gpus(char const* backend, std::string const& lacks, std::vector<ssd_device>& devices);

template <size_t Size>
void set(char (&target)[Size], std::string const& source) {
    std::snprintf(target, Size, "%s", source.c_str());
}

}  // namespace ssd_runtime
