#include "trt/engine_manifest.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include <sys/utsname.h>
#include <nlohmann/json.hpp>

#include "cache_names.h"
#include "failure.h"
#include "files.h"
#include "json_reader.h"

namespace ssd_runtime {
namespace {

// As in ssd_export/tensorrt/engine_manifest.py.
constexpr int64_t schema = 3, max_images = 1 << 16, max_prompt_tokens = 1 << 24, max_window = 64;
constexpr int64_t any_least = std::numeric_limits<int64_t>::min();
constexpr int64_t any_most = std::numeric_limits<int64_t>::max();
constexpr size_t max_json_bytes = size_t{64} << 20U;
char const file_name[] = "/engine.json";
char const engines_prefix[] = "engines/";

Bounds parse_bounds(JsonReader const& json, int64_t most) {
    std::vector<int64_t> numbers;
    json.each([&](JsonReader const& n) { numbers.push_back(n.integer(any_least, any_most)); });
    if (numbers.size() != 3) {
        json.wrong("a list of length 3");
    }
    Bounds const bounds{numbers[0], numbers[1], numbers[2]};
    bool const rise = bounds.least <= bounds.usual && bounds.usual <= bounds.most;
    if (!rise || bounds.least < 1 || bounds.most > most) {
        json.wrong(text("three rising numbers from 1 to ", most));
    }
    return bounds;
}

StoredWeight parse_weight(JsonReader const& json) {
    std::optional<Dtype> const dtype = dtype_named(json["dtype"].string());
    int64_t const offset = json["offset"].integer(any_least, any_most);
    int64_t const num_bytes = json["num_bytes"].integer(any_least, any_most);
    json["shape"].each([](JsonReader const& size) { size.integer(any_least, any_most); });
    if (!dtype || offset < 0 || num_bytes < 0) {
        json.wrong("a dtype, an offset and a size");
    }
    return {*dtype, static_cast<uint64_t>(offset), static_cast<uint64_t>(num_bytes)};
}

// has_window: whether the graph is a pass of lookahead.
Profile parse_profile(JsonReader const& json, bool has_window) {
    int64_t const window = json.has("window") ? json["window"].integer(any_least, any_most) : 0;
    Profile const profile{parse_bounds(json["images"], max_images),
                          parse_bounds(json["prompt_tokens"], max_prompt_tokens), window};
    if (has_window && (window < 2 || window > max_window)) {
        json["window"].wrong(text(2, " to ", max_window));
    }
    return profile;
}

EngineEntry parse_entry(std::string const& graph, JsonReader const& json) {
    EngineEntry entry{json["engine"].string(),
                      json["sha256"].string(),
                      static_cast<uint64_t>(json["bytes"].integer(0, any_most)),
                      {},
                      {},
                      {},
                      0};
    json["profiles"].each([&entry, &graph](JsonReader const& profile) {
        entry.profiles.push_back(parse_profile(profile, starts_with(graph, window_graph)));
    });
    if (entry.profiles.empty()) {
        json["profiles"].wrong("one or more");
    }
    json["aliases"].members([&entry](std::string const& output, JsonReader const& input) {
        entry.aliases[output] = input.string();
    });
    json["weights"].members([&entry](std::string const& name, JsonReader const& weight) {
        entry.weights.emplace(name, parse_weight(weight));
    });
    if (!json["activation_bytes"].is_null()) {
        entry.activation_bytes =
            static_cast<uint64_t>(json["activation_bytes"].integer(0, any_most));
    }
    return entry;
}

std::string text_or_empty(JsonReader const& json) { return json.is_null() ? "" : json.string(); }

std::optional<PluginEntry> parse_plugin(JsonReader const& json) {
    if (json.is_null()) {
        return std::nullopt;
    }
    return PluginEntry{text_or_empty(json["library"]), text_or_empty(json["sha256"]),
                       json["in_engine"].boolean()};
}

Form parse_form(JsonReader const& json) {
    std::string const name = json.string();
    if (name == "plugin") {
        return Form::plugin;
    }
    if (name == "kv-update") {
        return Form::kv_update;
    }
    if (name != "as bundled") {
        json.wrong("plugin or kv-update or as bundled");
    }
    return Form::as_bundled;
}

EngineManifest parse(JsonReader const& json) {
    EngineManifest manifest{json["flavor"].string(),
                            json["version"].string(),
                            {},
                            json["os"].string(),
                            json["arch"].string(),
                            json["bundle_hash"].string(),
                            parse_bounds(json["batch"], max_images),
                            json["prompt_slots"].integer(1, max_prompt_tokens),
                            parse_form(json["form"]),
                            parse_plugin(json["plugin"]),
                            json["weights_file"].string(),
                            {}};
    json["compute_capabilities"].each([&manifest](JsonReader const& capability) {
        manifest.compute_capabilities.push_back(capability.integer(any_least, any_most));
    });
    json["graphs"].members([&manifest](std::string const& name, JsonReader const& entry) {
        manifest.graphs.emplace(name, parse_entry(name, entry));
    });
    return manifest;
}

// 89 -> 8.9
std::string decimal(int64_t capability) { return text(capability / 10, ".", capability % 10); }

std::string this_arch() {
    utsname system{};
    return uname(&system) == 0 ? system.machine : "unknown";
}

// Whether a version as Python's module has it (10.3.0, 1.7.1.116) is this one. Some releases leave
// the build number out.
bool is_version(std::string const& built, std::string const& here) {
    return built == here ||
           (std::count(built.begin(), built.end(), '.') == 2 && here.rfind(built + ".", 0) == 0);
}

}  // namespace

std::vector<std::string> engine_folders(Bundle const& bundle) {
    std::vector<std::string> folders;
    for (std::string const& name : bundle.names()) {
        size_t const end = name.size() - std::min(name.size(), std::strlen(file_name));
        if (starts_with(name, engines_prefix) &&
            name.compare(end, std::string::npos, file_name) == 0) {
            folders.push_back(name.substr(0, end));
        }
    }
    return folders;
}

EngineManifest parse_engine_json(std::string const& content, std::string const& source,
                                 std::string const& again) {
    nlohmann::ordered_json parsed;
    try {
        parsed = parse_json(content);
    } catch (NotJson const& error) {
        fail(SSD_BAD_BUNDLE, source, ": not JSON (", error.what(), "); ", again);
    }
    JsonReader const json(parsed, source, again);
    int64_t const theirs = json["schema"].integer(any_least, any_most);
    if (theirs != schema) {
        fail(SSD_BAD_BUNDLE, source, " has schema ", theirs, " and this version reads ", schema,
             "; ", again);
    }
    return parse(json);
}

EngineManifest read_engine_json(Bundle const& bundle, std::string const& folder) {
    std::string content;
    read_file(bundle.file(folder + file_name), max_json_bytes, content);
    return parse_engine_json(content, bundle.path() + "/" + folder + file_name, rebuild(bundle));
}

void check_provenance(EngineManifest const& manifest, Here const& here, Bundle const& bundle) {
    std::string const again = rebuild(bundle);
    if (manifest.flavor != here.flavor || !is_version(manifest.version, here.version)) {
        fail(SSD_UNAVAILABLE, "the engine was built with ", manifest.flavor, " ", manifest.version,
             " and ", here.flavor, " ", here.version, " is here; ", again);
    }
    auto const& capabilities = manifest.compute_capabilities;
    if (std::find(capabilities.begin(), capabilities.end(), here.compute_capability) ==
        capabilities.end()) {
        std::string wanted;
        for (int64_t const capability : capabilities) {
            wanted += (wanted.empty() ? "" : ", ") + decimal(capability);
        }
        fail(SSD_UNAVAILABLE, "the engine is for GPUs of compute capability ", wanted,
             " and this one has ", decimal(here.compute_capability), "; ", again);
    }
    if (manifest.os != "linux" || manifest.arch != this_arch()) {
        fail(SSD_UNAVAILABLE, "the engine is for ", manifest.os, " ", manifest.arch,
             " and this is linux ", this_arch(), "; ", again);
    }
    if (manifest.bundle_hash != bundle.hash()) {
        fail(SSD_UNAVAILABLE, "the engine was built from another bundle than ", bundle.path(), "; ",
             again);
    }
}

void check_batch(EngineManifest const& manifest, int64_t num_images, Bundle const& bundle) {
    Bounds const& batch = manifest.batch;
    if (!batch.hold(num_images)) {
        fail(SSD_INVALID_ARGUMENT, "the engine generates ", batch.least, " to ", batch.most,
             " images at once, not ", num_images, "; ", rebuild(bundle), " --batch ",
             std::min(batch.least, num_images), ":", batch.usual, ":",
             std::max(batch.most, num_images));
    }
}

std::string rebuild(Bundle const& bundle) {
    return "build it here: ssd-export build-engine --bundle " + bundle.path();
}

}  // namespace ssd_runtime
