#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "auto_window.h"
#include "runner.h"

namespace ssd_runtime {

// Guesses of the tokens that are still to come, for every image, as ssd_export/runtime/lookahead.py
// makes them: what the pass before sampled there, the token above or the left neighbor, whichever
// has been right more often lately in this image.
class Drafts {
public:
    Drafts(size_t num_images, Grid const& grid);

    // Takes what a pass sampled from each image's step on, [N, width]: the first kept of them are
    // tokens, the others guesses.
    void sampled(std::vector<int64_t> const& first, SampledWindow const& sampled);

    // int32 [N, width]: the token before each image's step, then drafts of those from it on; of an
    // image that is done, the token that was written last.
    std::vector<int32_t> inputs(std::vector<int64_t> const& first, int64_t width);

private:
    enum Source { left, above, previous, num_sources };
    static constexpr int32_t none = -1;
    struct Image {
        std::vector<int32_t> tokens, previous;
        std::array<double, num_sources> right{};
    };

    std::array<int32_t, num_sources> guesses(Image const& image, int64_t step) const;
    int32_t best(Image const& image, int64_t step) const;

    int64_t grid_width_, num_tokens_;
    std::vector<Image> images_;
};

// Noise of windows that begin at each image's own step, made a grid row at a time and kept in a
// ring of as many rows as a window can touch.
class WindowNoise {
public:
    WindowNoise(PromptBatch const& batch, ModelConfig const& model, int64_t widest);

    // float32 [N, width, V] of each image's steps from `first` on; zeros for a greedy batch. The
    // ring of an image is allocated when it is first asked for.
    std::vector<float> of(std::vector<int64_t> const& first, int64_t width);

private:
    void reach(size_t image, int64_t step);

    Grid grid_;
    size_t codebook_;
    int64_t num_rows_;
    bool is_greedy_;
    std::vector<ImageSeed> images_;
    std::vector<int64_t> next_row_;
    std::vector<std::vector<float>> rings_;
};

// Several tokens of an image in one pass, and the same tokens as one at a time: a token counts
// while all drafts before it were right. Every image goes at its own pace.
class Lookahead {
public:
    // window: the most tokens of a pass. Follows the prefill of the batch, whose token 0 it reads.
    Lookahead(Runner& runner, PromptBatch const& batch, Config const& config, int64_t window);
    // The window is chosen for the one image of the batch.
    Lookahead(Runner& runner, PromptBatch const& batch, Config const& config, AutoWindow window);

    // Generates until every image has its tokens before step `end`, or `stop` is true.
    void reach(int64_t end, std::atomic<bool> const& stop);

    // Passes so far, single steps among them.
    uint32_t passes() const { return passes_; }

private:
    void pass();
    void step();
    void take(SampledWindow const& sampled);

    Runner& runner_;
    std::unique_ptr<AutoWindow> auto_;
    int64_t window_, num_tokens_;
    std::vector<std::vector<int64_t>> rooms_;  // of each image from each step on
    std::vector<int64_t> first_;               // the next step of each image
    WindowNoise noise_;
    Drafts drafts_;
    uint32_t passes_ = 0;
};

}  // namespace ssd_runtime
