#pragma once

#include <map>
#include <string>
#include <vector>

#include "config.h"

namespace ssd_runtime {

// A bundle whose fixed files were all there and unchanged when it was opened. Those of engines/ and
// reports/, which are added later, are checked when they are used: a bundle that was copied without
// them is whole for everything else.
class Bundle {
public:
    // Throws Failure SSD_BAD_BUNDLE, in the sentences of ssd_export/bundle.
    explicit Bundle(std::string const& path);

    Config const& config() const { return config_; }
    std::string const& path() const { return path_; }
    std::string const& hash() const { return hash_; }

    // The path of a file that the manifest names. Throws Failure where it names no such file, and
    // for a file added later that is missing or changed.
    std::string file(std::string const& name) const;
    bool has(std::string const& name) const { return files_.count(name) > 0; }
    std::vector<std::string> names() const;
    std::string const& sha256(std::string const& name) const { return files_.at(name).sha256; }
    uint64_t num_bytes(std::string const& name) const { return files_.at(name).num_bytes; }

private:
    struct Entry {
        uint64_t num_bytes;
        std::string sha256;
    };

    void read_manifest();
    void check_file(std::string const& name, Entry const& entry) const;
    std::string bundle_hash() const;

    std::string path_;
    std::map<std::string, Entry> files_;  // sorted by name as bytes
    std::string hash_;
    Config config_;
};

}  // namespace ssd_runtime
