#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "config.h"
#include "failure.h"
#include "noise.h"
#include "ssd_runtime/ssd_runtime.h"

namespace ssd_runtime {

// cfg_scale: guidance u + cfg_scale (c - u); temperature: 0 is greedy; top_k: 0 keeps every token.
struct Sampling {
    float cfg_scale, temperature;
    int64_t top_k;
};

// What starts a batch of N images. embeds: [rows, width, hidden], padded on the right; lengths:
// [rows]; rows: N or, with guidance, 2 N, the conditional ones first.
struct PromptBatch {
    std::vector<float> embeds;
    int64_t width;
    std::vector<int32_t> lengths;
    std::vector<ImageSeed> images;
    Sampling sampling;

    int64_t num_images() const { return static_cast<int64_t>(images.size()); }
};

// What a pass over several steps of every image takes. first: the next step of each, the number of
// tokens where it is done; limit: the most tokens to keep, 0 where it is done, and no more than the
// caches have room for; inputs: [N, width], the token before that step, then drafts of those from
// it on; noise: makes [N, width, codebook] of the steps, for a backend that does not make its own.
struct Window {
    std::vector<int64_t> first, limit;
    std::vector<int32_t> inputs;
    std::function<std::vector<float>()> noise;

    int64_t width() const { return static_cast<int64_t>(inputs.size() / first.size()); }

    // Throws Failure SSD_BAD_BUNDLE where a graph kept more tokens of an image than it may.
    void check_kept(std::string const& graph, std::vector<int64_t> const& kept) const {
        for (size_t image = 0; image < limit.size(); ++image) {
            if (kept[image] < 0 || kept[image] > limit[image]) {
                fail(SSD_BAD_BUNDLE, "graph ", graph, " kept ", kept[image], " tokens of at most ",
                     limit[image], "; export the bundle again");
            }
        }
    }
};

// tokens: [N, width]; kept: how many of each image are those that single steps would sample.
struct SampledWindow {
    std::vector<int32_t> tokens;
    std::vector<int64_t> kept;
};

// The caches of one generation on one backend. Call order: prefill, then decode_row for rows in
// order; decode_image at any time.
class Runner {
public:
    virtual ~Runner() = default;

    // Fills fresh caches from the prompts and generates token 0.
    virtual void prefill(PromptBatch const& batch) = 0;

    // Generates the tokens of steps first .. last - 1. Stops early once `stop` is true.
    virtual void decode_row(int64_t first, int64_t last, std::atomic<bool> const& stop) = 0;

    // Why there is no decode_window, with the way out; "" where there is one.
    virtual std::string why_no_window() const {
        return "this backend takes one token a pass; use lookahead 1";
    }

    // Tokens that every pass computes, whatever is asked of it, and the most that can be; 0 where a
    // pass has as many as it is asked for.
    virtual int64_t fixed_window() const { return 0; }

    // CPU threads that a step computes with; 0: a GPU does.
    virtual int cpu_threads() const { return 0; }
    // Whether going from single steps to passes opens a graph, every time.
    virtual bool opens_again() const { return false; }
    // Whether steps have the operators of engines/operators, of which passes have but some.
    virtual bool fuses_steps() const { return false; }

    // Samples several tokens of every image in one pass, and keeps those that single steps would
    // sample. Evictions that are due before an image's first step are part of it.
    virtual SampledWindow decode_window(Window const& /*window*/) {
        fail(SSD_INVALID_ARGUMENT, why_no_window());
    }

    // int32 [N, tokens]; 0 where still to come. Waits for the device.
    virtual std::vector<int32_t> tokens() = 0;

    // Pixels uint8 [count, height, width, 3] of codes int32 [count, tokens].
    virtual void decode_image(int32_t const* codes, int64_t count, uint8_t* pixels) = 0;

    // Bytes allocated for the caches of the present batch.
    virtual uint64_t cache_bytes() const = 0;

    // Whether a decode step is launched as a whole, as a CUDA graph.
    virtual bool step_is_captured() const { return false; }

    // From any thread: ends the run under way as soon as the backend can.
    virtual void interrupt() {}
};

// The weights of a bundle on one device; serves any number of runners on any threads.
class Backend {
public:
    virtual ~Backend() = default;
    virtual std::unique_ptr<Runner> make_runner() = 0;
    // The most images of one batch.
    virtual uint32_t max_images() const = 0;
    // Why images are decoded in float although the bundle has an int8 decoder; "" where they are
    // decoded in int8.
    virtual std::string why_float_decoder() const {
        return "images are decoded in float: the int8 image decoder is ONNX Runtime's on a CPU";
    }
    // Fills in what weights, image decoder and all of a batch of plan.num_images take, and what is
    // free; plan.cache_bytes is known.
    virtual void estimate(uint32_t decoder_batch, ssd_memory_plan& plan) const = 0;
};

}  // namespace ssd_runtime
