#pragma once

#include <string>

#include "trt/engine_manifest.h"

namespace ssd_runtime {

// A folder of engines that fits this machine. An engine is code: only files whose hash is in
// engine.json and in the bundle's manifest are loaded.
class EngineFiles {
public:
    EngineFiles(Bundle const& bundle, std::string folder, EngineManifest manifest)
        : bundle_(bundle), folder_(std::move(folder)), manifest_(std::move(manifest)) {}

    Bundle const& bundle() const { return bundle_; }
    std::string const& folder() const { return folder_; }
    EngineManifest const& manifest() const { return manifest_; }
    EngineEntry const& entry(std::string const& graph) const { return manifest_.graphs.at(graph); }
    bool has(std::string const& graph) const { return manifest_.graphs.count(graph) > 0; }

    // Whether the decode step's plugin evicts by itself (R7): then there is no evict engine.
    bool evicts_in_step() const { return manifest_.plugin.has_value(); }

    // How many images the image decoder takes at a time, where there are as many.
    int64_t decoder_images() const;

    // Tokens of a pass of lookahead, 0 where there is no engine for it; and the most images of one.
    int64_t window() const;
    int64_t window_images() const;
    // Why these engines take one token a pass, with the way out; "" where they take more.
    std::string why_no_window() const;

    // Throws Failure where there is no engine of that graph.
    void need(std::string const& graph) const;

    // The number of the profile that takes so many images. Throws Failure where there is none.
    int32_t profile_for(std::string const& graph, int64_t num_images) const;

    // The checked file of a graph's engine. Throws Failure where there is none, or another than
    // engine.json describes.
    std::string path(std::string const& graph) const;

    // The checked library of the plugin; empty where the engine files carry it. Throws Failure
    // where it is missing.
    std::string plugin_library() const;

    std::string weights_path() const { return bundle_.file(manifest_.weights_file); }
    // The weights that any engine takes as inputs, by name.
    std::map<std::string, StoredWeight> weights() const;
    // Bytes of the engine files that every generation loads, without top-k and lookahead.
    uint64_t num_bytes() const;

private:
    bool is_file(std::string const& name, std::string const& sha256) const;

    Bundle const& bundle_;
    std::string folder_;
    EngineManifest manifest_;
};

// The bundle's engines for this machine. Throws Failure, one line with the command that builds
// fitting ones; where none fits, with the reason of the engines that come nearest: those for this
// GPU.
EngineFiles find_engines(Bundle const& bundle, Here const& here);

// Throws Failure SSD_UNAVAILABLE for a bundle without any engines.
void need_engines(Bundle const& bundle);

}  // namespace ssd_runtime
