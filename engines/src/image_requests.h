#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model.h"
#include "runner.h"

namespace ssd_runtime {

// The images that a request asks for: the prompts and random numbers of each, the sampling of all.
class ImageRequests {
public:
    // Copies what it needs of params. Throws Failure for prompts, seeds or numbers that will not
    // do.
    ImageRequests(std::shared_ptr<Model> model, ssd_generate_params const& params);

    size_t num_images() const { return conditional_.size() * images_per_prompt_; }

    // The inputs that start the images first .. first + count - 1.
    PromptBatch batch(uint32_t first, uint32_t count) const;

private:
    using Row = std::vector<int32_t>;

    Row read(ssd_prompt const& prompt, std::string const& kind, size_t index) const;
    void read_embeddings(ssd_generate_params const& params);
    void read_unconditional(ssd_generate_params const& params);

    std::shared_ptr<Model> model_;
    Sampling sampling_;
    uint64_t seed_;
    std::vector<uint64_t> seeds_;  // of each image, in place of seed_
    size_t images_per_prompt_;
    std::vector<Row> conditional_;           // of each prompt
    std::vector<std::vector<float>> given_;  // embeddings in their place, or none
    std::vector<Row> unconditional_;         // of each prompt or each image; none without guidance
};

}  // namespace ssd_runtime
