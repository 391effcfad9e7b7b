#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bundle.h"
#include "prompt.h"
#include "runner.h"
#include "ssd_runtime/ssd_runtime.h"

namespace ssd_runtime {

// What a caller asks a model to be opened with. backend, provider: empty chooses.
struct ModelRequest {
    std::string bundle, backend, provider;
    int device, num_threads;
};

// A bundle, ready to generate from; used by any number of threads at once.
class Model {
public:
    // Throws Failure for a damaged bundle, an unknown backend or provider, one that cannot start.
    explicit Model(ModelRequest const& request);

    Bundle const& bundle() const { return bundle_; }
    Config const& config() const { return bundle_.config(); }
    PromptEncoder const& prompts() const { return *prompts_; }
    Embeddings const& embeddings() const { return embeddings_; }
    Backend& backend() const { return *backend_; }
    void describe(ssd_model_info& info) const;
    void plan(uint32_t num_images, uint32_t decoder_batch, ssd_memory_plan& plan) const;

private:
    Bundle bundle_;
    std::unique_ptr<PromptEncoder> prompts_;
    Embeddings embeddings_;
    std::unique_ptr<Backend> backend_;
};

// The places where this build can generate, in order of preference.
std::vector<ssd_device> list_devices();

}  // namespace ssd_runtime
