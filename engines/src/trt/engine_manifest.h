#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bundle.h"

namespace ssd_runtime {

// The forms of a decode step's attention (ssd_export/tensorrt/step_form.py): who writes the caches
// in place, and whether keys and values are [rows x heads, 1, slots, head_dim].
enum class Form { plugin, kv_update, as_bundled };

struct Bounds {
    int64_t least, usual, most;

    bool hold(int64_t number) const { return least <= number && number <= most; }
};

// window: places of a pass of lookahead; 0 in graphs that have none.
struct Profile {
    Bounds images, prompt_tokens;
    int64_t window;
};

constexpr char window_graph[] = "decode_window";

// A tensor of the weights file that engines take as an input. offset: from the file's start.
struct StoredWeight {
    Dtype dtype;
    uint64_t offset, num_bytes;
};

struct EngineEntry {
    std::string engine, sha256;  // of the file in the engines' folder
    uint64_t num_bytes;
    std::vector<Profile> profiles;               // disjoint in images
    std::map<std::string, std::string> aliases;  // output -> the input whose memory it is
    std::map<std::string, StoredWeight> weights;
    uint64_t activation_bytes;  // 0 where the builder did not say
};

// library: empty where the engine's builder had the plugin registered by itself.
struct PluginEntry {
    std::string library, sha256;
    bool in_engine;
};

// engine.json: what a folder of engines was built from and for.
struct EngineManifest {
    std::string flavor, version;
    std::vector<int64_t> compute_capabilities;  // times ten
    std::string os, arch, bundle_hash;
    Bounds batch;
    int64_t prompt_slots;
    Form form;
    std::optional<PluginEntry> plugin;
    std::string weights_file;
    std::map<std::string, EngineEntry> graphs;
};

// The machine on which an engine is about to be loaded. version: major.minor.patch.build.
struct Here {
    std::string flavor, version;
    int64_t compute_capability;
};

// The folders of engines in a bundle, whatever is in them.
std::vector<std::string> engine_folders(Bundle const& bundle);

// source, again: begin and end what Failure SSD_BAD_BUNDLE says of a wrong value.
EngineManifest parse_engine_json(std::string const& content, std::string const& source,
                                 std::string const& again);

// Throws Failure SSD_BAD_BUNDLE, with the command that builds the engines again.
EngineManifest read_engine_json(Bundle const& bundle, std::string const& folder);

// Throws Failure SSD_UNAVAILABLE for engines of another flavor, version, GPU, system or bundle.
void check_provenance(EngineManifest const& manifest, Here const& here, Bundle const& bundle);

// Throws Failure SSD_INVALID_ARGUMENT for a batch outside the engines' profiles.
void check_batch(EngineManifest const& manifest, int64_t num_images, Bundle const& bundle);

// The advice that ends every refusal.
std::string rebuild(Bundle const& bundle);

}  // namespace ssd_runtime
