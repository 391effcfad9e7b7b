#include "bundle.h"

#include <algorithm>
#include <limits>

#include <nlohmann/json.hpp>

#include "failure.h"
#include "files.h"
#include "json_reader.h"

namespace ssd_runtime {
namespace {

using Json = nlohmann::ordered_json;

constexpr int schema_version = 3;
constexpr size_t max_json_bytes = size_t{64} << 20U;
char const config_name[] = "ssd_config.json";
char const manifest_name[] = "manifest.json";
std::string const export_again =
    "export it again with --force, or copy it again from where it came";
char const* const added_later[] = {"engines/", "reports/"};

Json read_json(std::string const& path, std::string const& if_missing, std::string& content) {
    if (!read_file(path, max_json_bytes, content)) {
        throw Failure(SSD_BAD_BUNDLE, if_missing);
    }
    try {
        return parse_json(content);
    } catch (NotJson const& error) {
        fail(SSD_BAD_BUNDLE, path, ": not JSON (", error.what(), "); ", export_again);
    }
}

void check_schema(std::string const& path, std::string const& folder, Json const& config) {
    JsonReader const json(config, path, export_again);
    int64_t const version =
        json.has("schema_version")
            ? json["schema_version"].integer(std::numeric_limits<int32_t>::min())
            : 0;
    if (version < 1) {
        fail(SSD_BAD_BUNDLE, path, " has no schema version: this is no bundle of ssd-export; ",
             export_again);
    }
    if (version < schema_version) {
        fail(SSD_BAD_BUNDLE, path, " has schema version ", version,
             ", from an earlier ssd-export, and this one reads version ", schema_version,
             "; make it again with `ssd-export export --out ", folder, " --force`");
    }
    if (version > schema_version) {
        std::string const theirs =
            json.has("tool_version") ? json["tool_version"].string() : "of a later version";
        fail(SSD_BAD_BUNDLE, path, " has schema version ", version, " and this is ssd_runtime ",
             ssd_version(), ", which reads version ", schema_version, ": use ssd_runtime ", theirs,
             " or newer, or export it again with ssd-export ", ssd_version());
    }
}

// Whether a manifest's name stays inside the bundle: relative, forward slashes, no `..`.
bool is_inside(std::string const& name) {
    if (name.empty() || name.front() == '/' || name.back() == '/') {
        return false;
    }
    for (char const byte : name) {
        if (static_cast<unsigned char>(byte) < 0x20U || byte == 0x7F || byte == '\\' ||
            byte == ':') {
            return false;
        }
    }
    for (size_t start = 0; start <= name.size();) {
        size_t const end = std::min(name.find('/', start), name.size());
        std::string const part = name.substr(start, end - start);
        if (part.empty() || part == "." || part == "..") {
            return false;
        }
        start = end + 1;
    }
    return true;
}

bool is_sha256(std::string const& text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

bool is_added_later(std::string const& name) {
    return std::any_of(std::begin(added_later), std::end(added_later),
                       [&name](char const* folder) { return name.rfind(folder, 0) == 0; });
}

// How a file that is missing or changed is made again.
std::string way_out(std::string const& name, std::string const& bundle) {
    if (name.rfind(added_later[0], 0) == 0) {
        return "build the engines again: ssd-export build-engine --bundle " + bundle;
    }
    return is_added_later(name) ? "run the verb that wrote it again" : export_again;
}

// The manifest as the exporter writes it, to the byte.
std::string manifest_text(Json const& manifest) {
    std::map<std::string, Json> sorted;
    for (auto const& [name, entry] : manifest["files"].items()) {
        sorted[name] = entry;
    }
    Json files = Json::object();
    for (auto const& [name, entry] : sorted) {
        files[name] = entry;
    }
    Json const whole = {{"schema_version", schema_version}, {"files", files}};
    return whole.dump(1, ' ', true) + "\n";
}

}  // namespace

Bundle::Bundle(std::string const& path) : path_(path) {
    std::string content;
    std::string const config_path = path + "/" + config_name;
    Json const config =
        read_json(config_path,
                  text("no bundle at ", path,
                       ": make one with `ssd-export export`, or give the folder of one"),
                  content);
    check_schema(config_path, path, config);
    config_ = Config::parse(config, config_path, export_again);
    read_manifest();
    for (auto const& [name, entry] : files_) {
        if (!is_added_later(name)) {
            check_file(name, entry);
        }
    }
    hash_ = bundle_hash();
}

void Bundle::read_manifest() {
    std::string content;
    std::string const path = path_ + "/" + manifest_name;
    Json const manifest = read_json(
        path, text("bundle ", path_, ": ", manifest_name, " is missing; ", export_again), content);
    std::string const source = path + " is damaged";
    JsonReader const json(manifest, source, export_again);
    json["schema_version"].integer(0);
    json["files"].members([this, &source](std::string const& name, JsonReader const& entry) {
        constexpr int64_t most = std::numeric_limits<int64_t>::max();
        int64_t const num_bytes = entry["bytes"].integer(std::numeric_limits<int64_t>::min(), most);
        std::string const sha256 = entry["sha256"].string();
        if (!is_inside(name) || num_bytes < 0 || !is_sha256(sha256)) {
            fail(SSD_BAD_BUNDLE, source, ": its entry of '", name.substr(0, 200),
                 "' names no file of this bundle; ", export_again);
        }
        files_[name] = {static_cast<uint64_t>(num_bytes), sha256};
    });
    if (!has(config_name) || manifest_text(manifest) != content) {
        fail(SSD_BAD_BUNDLE, source, "; ", export_again);
    }
}

void Bundle::check_file(std::string const& name, Entry const& entry) const {
    std::string const path = path_ + "/" + name;
    FileStatus const status = file_status(path);
    if (!status.exists) {
        fail(SSD_BAD_BUNDLE, "bundle ", path_, ": ", name, " is missing; ", way_out(name, path_));
    }
    if (status.num_bytes != entry.num_bytes) {
        fail(SSD_BAD_BUNDLE, "bundle ", path_, ": ", name, " has ", status.num_bytes,
             " bytes, the manifest says ", entry.num_bytes, "; ", way_out(name, path_));
    }
    if (sha256_of_file(path) != entry.sha256) {
        fail(SSD_BAD_BUNDLE, "bundle ", path_, ": ", name,
             " was changed (its sha256 is not the manifest's); ", way_out(name, path_));
    }
}

std::string Bundle::bundle_hash() const {
    std::string listing;
    for (auto const& [name, entry] : files_) {
        if (!is_added_later(name)) {
            listing += entry.sha256 + "  " + name + "\n";
        }
    }
    return sha256_of_text(listing);
}

std::vector<std::string> Bundle::names() const {
    std::vector<std::string> names;
    for (auto const& [name, entry] : files_) {
        names.push_back(name);
    }
    return names;
}

std::string Bundle::file(std::string const& name) const {
    if (!has(name)) {
        fail(SSD_BAD_BUNDLE, "bundle ", path_, " has no ", name, "; ", export_again);
    }
    if (is_added_later(name)) {
        check_file(name, files_.at(name));
    }
    return path_ + "/" + name;
}

}  // namespace ssd_runtime
