#include "trt/engine_files.h"

#include <algorithm>
#include <vector>

#include "cache_names.h"
#include "failure.h"

namespace ssd_runtime {
namespace {

char const top_k_suffix[] = "_top_k";
constexpr int usual_window = 16;  // as ssd_export/tensorrt/window_plan.py says

bool has_top_k(std::string const& graph) {
    size_t const size = sizeof top_k_suffix - 1;
    return graph.size() >= size && graph.compare(graph.size() - size, size, top_k_suffix) == 0;
}

}  // namespace

int64_t EngineFiles::decoder_images() const {
    int64_t most = 1;
    if (has(image_decoder)) {
        for (Profile const& profile : entry(image_decoder).profiles) {
            most = std::max(most, profile.images.most);
        }
    }
    return most;
}

int64_t EngineFiles::window() const {
    return has(window_graph) ? entry(window_graph).profiles.front().window : 0;
}

int64_t EngineFiles::window_images() const {
    int64_t most = 0;
    for (Profile const& profile : entry(window_graph).profiles) {
        most = std::max(most, profile.images.most);
    }
    return most;
}

std::string EngineFiles::why_no_window() const {
    if (window() > 0) {
        return "";
    }
    return text("these engines take one token a pass; ", rebuild(bundle_), " --lookahead ",
                usual_window, ", or use lookahead 1");
}

void EngineFiles::need(std::string const& graph) const {
    if (!has(graph)) {
        fail(SSD_UNAVAILABLE, folder_, " has no engine of ", graph, "; ", rebuild(bundle_),
             has_top_k(graph) ? " --top-k" : "", ", or use the backend onnxruntime");
    }
}

int32_t EngineFiles::profile_for(std::string const& graph, int64_t num_images) const {
    need(graph);
    std::vector<Profile> const& profiles = entry(graph).profiles;
    for (size_t number = 0; number < profiles.size(); ++number) {
        if (profiles[number].images.hold(num_images)) {
            return static_cast<int32_t>(number);
        }
    }
    fail(SSD_INVALID_ARGUMENT, "the engine of ", graph, " has no profile for ", num_images,
         " images; ", rebuild(bundle_));
}

std::string EngineFiles::path(std::string const& graph) const {
    need(graph);
    std::string const name = folder_ + "/" + entry(graph).engine;
    if (!is_file(name, entry(graph).sha256)) {
        fail(SSD_BAD_BUNDLE, name, " is not the engine that engine.json describes; ",
             rebuild(bundle_));
    }
    return bundle_.file(name);
}

std::string EngineFiles::plugin_library() const {
    if (!manifest_.plugin || manifest_.plugin->in_engine) {
        return "";
    }
    std::string const name = folder_ + "/" + manifest_.plugin->library;
    if (!is_file(name, manifest_.plugin->sha256)) {
        fail(SSD_BAD_BUNDLE, "the engines need the plugin library ", name,
             ", which is not there as it was built; ", rebuild(bundle_));
    }
    return bundle_.file(name);
}

bool EngineFiles::is_file(std::string const& name, std::string const& sha256) const {
    return bundle_.has(name) && bundle_.sha256(name) == sha256;
}

std::map<std::string, StoredWeight> EngineFiles::weights() const {
    std::map<std::string, StoredWeight> all;
    for (auto const& [graph, entry] : manifest_.graphs) {
        all.insert(entry.weights.begin(), entry.weights.end());
    }
    return all;
}

uint64_t EngineFiles::num_bytes() const {
    uint64_t sum = 0;
    for (auto const& [graph, entry] : manifest_.graphs) {
        bool const is_extra = has_top_k(graph) || starts_with(graph, window_graph);
        sum += is_extra ? 0 : entry.num_bytes;
    }
    return sum;
}

void need_engines(Bundle const& bundle) {
    if (engine_folders(bundle).empty()) {
        fail(SSD_UNAVAILABLE, "bundle ", bundle.path(), " has no TensorRT engines; ",
             rebuild(bundle), ", or use the backend onnxruntime");
    }
}

EngineFiles find_engines(Bundle const& bundle, Here const& here) {
    need_engines(bundle);
    std::vector<std::pair<std::string, EngineManifest>> found;
    std::vector<Failure> refusals, unreadable;
    for (std::string const& folder : engine_folders(bundle)) {
        try {  // a folder that was copied in part says nothing of the others
            found.emplace_back(folder, read_engine_json(bundle, folder));
        } catch (Failure const& failure) {
            unreadable.push_back(failure);
        }
    }
    std::stable_partition(found.begin(), found.end(), [&here](auto const& folder) {
        auto const& capabilities = folder.second.compute_capabilities;
        return std::find(capabilities.begin(), capabilities.end(), here.compute_capability) !=
               capabilities.end();
    });
    for (auto& [folder, manifest] : found) {
        try {
            check_provenance(manifest, here, bundle);
            return EngineFiles(bundle, folder, std::move(manifest));
        } catch (Failure const& failure) {
            refusals.push_back(failure);
        }
    }
    throw refusals.empty() ? unreadable.front() : refusals.front();
}

}  // namespace ssd_runtime
