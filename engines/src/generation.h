#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "image_requests.h"
#include "lookahead.h"

namespace ssd_runtime {

// The images of one request, generated batch after batch and row after row: the loop of every
// backend.
class Generation {
public:
    // Copies what it needs of params. Throws Failure for numbers out of range and bad prompts.
    Generation(std::shared_ptr<Model> model, ssd_generate_params const& params);

    // Generates one grid row; false where nothing was left. Throws Failure SSD_CANCELLED.
    bool step_row(ssd_row_event& event);
    // Generates everything, with the callback of the parameters.
    void run();

    // From any thread.
    void cancel(int32_t when);

    ssd_images images() const;
    ssd_cache_report cache_report() const;

    // Marks the generation as used by one call. Throws Failure SSD_BUSY where another is under way.
    class Use {
    public:
        // only_reads: also allowed inside a callback, on the thread that generates.
        explicit Use(Generation const& generation, bool only_reads = false);
        Use(Use const&) = delete;
        Use& operator=(Use const&) = delete;
        ~Use();

    private:
        std::atomic<std::thread::id>& user_;
        bool is_nested_ = false;
    };

private:
    void place_pixels(ssd_generate_params const& params);
    void begin_batch();
    void choose_passes(PromptBatch const& batch);
    void check_lookahead() const;
    void check_not_cancelled();
    void check_usable();
    uint32_t generate_row();
    void decode(int32_t const* tokens, uint8_t* pixels);
    void make_preview();
    void fill_event(ssd_row_event& event, uint32_t row) const;
    uint32_t num_images() const { return static_cast<uint32_t>(requests_.num_images()); }
    size_t num_tokens() const;
    size_t image_bytes() const;

    std::shared_ptr<Model> model_;
    ImageRequests requests_;
    uint32_t max_batch_, decoder_batch_;
    bool preview_;
    int32_t lookahead_;
    ssd_row_callback on_row_;
    void* user_data_;

    std::unique_ptr<Runner> runner_;
    std::unique_ptr<Lookahead> ahead_;  // of the present batch; NULL: it takes one token a pass
    uint32_t first_ = 0, count_ = 0;    // the images generated now
    uint32_t row_ = 0;                  // the next one
    uint32_t finished_ = 0;             // images with pixels
    std::vector<int32_t> lengths_;      // of the present batch
    std::vector<int32_t> tokens_;       // [images, tokens]
    std::vector<uint8_t> own_pixels_, preview_pixels_;
    uint8_t* pixels_;

    bool has_failed_ = false;
    std::atomic<bool> stop_{false}, stop_after_images_{false};
    mutable std::atomic<std::thread::id> user_{std::thread::id()};  // no thread: free
};

}  // namespace ssd_runtime
