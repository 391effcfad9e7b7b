#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model.h"
#include "runner.h"

namespace ssd_runtime {

// What this library was built with (SSD_RUNTIME_BACKENDS).
struct BackendEntry {
    char const* name;
    std::unique_ptr<Backend> (*open)(Bundle const& bundle, ModelRequest const& request);
    // Appends the places where it can generate, the unavailable ones with their reasons.
    void (*list)(std::vector<ssd_device>& devices);
};

// In order of preference.
std::vector<BackendEntry> const& backends();

// Throws Failure for a name that is none of them, and what the backend throws.
std::unique_ptr<Backend> open_backend(Bundle const& bundle, ModelRequest const& request);

}  // namespace ssd_runtime
