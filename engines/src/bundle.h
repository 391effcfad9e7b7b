#pragma once

#include <map>
#include <string>

#include "config.h"

namespace ssd_runtime {

// A bundle whose files were all there and unchanged when it was opened.
class Bundle {
public:
    // Throws Failure SSD_BAD_BUNDLE, in the sentences of ssd_export/bundle.
    explicit Bundle(std::string const& path);

    Config const& config() const { return config_; }
    std::string const& path() const { return path_; }
    std::string const& hash() const { return hash_; }

    // The path of a file that the manifest names. Throws Failure where it names no such file.
    std::string file(std::string const& name) const;
    bool has(std::string const& name) const { return files_.count(name) > 0; }
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
