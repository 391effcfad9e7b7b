#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "ort/ort_api.h"

#include "bundle.h"

namespace ssd_runtime {

// Whether a graph multiplies by the language model's weights.
bool holds_language_model(std::string const& graph);

// The ONNX Runtime sessions of a bundle, each opened when it is first asked for.
class OrtSessions {
public:
    // Throws Failure SSD_UNAVAILABLE for a provider that this ONNX Runtime lacks or cannot start.
    OrtSessions(Bundle const& bundle, std::string const& provider, int device, int num_threads);

    // Shared, so that a session that is dropped here ends with its last user. Thread-safe.
    std::shared_ptr<Ort::Session> get(std::string const& graph);

    // The graph that decodes images, and why it is the float one although there is an int8 one.
    std::string const& image_decoder() const { return image_decoder_; }
    std::string const& why_float_decoder() const { return why_float_decoder_; }

    // Whether a graph is opened in the form that the operators of engines/operators compute.
    bool fuses(std::string const& graph) const;

    bool is_cuda() const { return is_cuda_; }
    int device() const { return device_; }
    // Threads that a graph computes with on the CPU.
    int num_threads() const;
    // Whether a session of the language model is closed when another of its graphs is opened.
    bool holds_one() const { return holds_one_; }

private:
    std::shared_ptr<Ort::Session> open(std::string const& graph) const;
    Ort::SessionOptions options(std::string const& graph) const;
    void choose_decoder();
    void check_interface(Ort::Session const& session, std::string const& graph) const;

    Bundle const& bundle_;
    Ort::Env env_;
    bool is_cuda_;
    int device_, num_threads_;
    std::string image_decoder_, why_float_decoder_;
    bool holds_one_;  // where weights are large: each session has a packed copy of them
    std::mutex mutex_;
    std::map<std::string, std::shared_ptr<Ort::Session>> sessions_;
};

}  // namespace ssd_runtime
