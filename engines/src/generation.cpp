#include "generation.h"

#include <algorithm>
#include <cstring>

#include "failure.h"

namespace ssd_runtime {
namespace {

constexpr uint8_t not_generated_yet = 235;  // gray of the part of a preview that is still to come

}  // namespace

Generation::Use::Use(Generation const& generation, bool only_reads) : user_(generation.user_) {
    std::thread::id free;
    if (user_.compare_exchange_strong(free, std::this_thread::get_id())) {
        return;
    }
    is_nested_ = only_reads && free == std::this_thread::get_id();  // now: the thread that uses it
    if (!is_nested_) {
        fail(SSD_BUSY,
             "this generation is in use by another call; wait until that returns, or "
             "create another generation of the same model");
    }
}

Generation::Use::~Use() {
    if (!is_nested_) {
        user_ = std::thread::id();
    }
}

Generation::Generation(std::shared_ptr<Model> model, ssd_generate_params const& params)
    : model_(std::move(model)),
      requests_(model_, params),
      max_batch_(std::min(params.max_batch, model_->backend().max_images())),
      decoder_batch_(params.decoder_batch),
      preview_(params.preview != 0),
      lookahead_(params.lookahead),
      on_row_(params.on_row),
      user_data_(params.user_data),
      runner_(model_->backend().make_runner()),
      pixels_(nullptr) {
    for (auto const& [name, count] :
         {std::pair("max_batch", max_batch_), std::pair("decoder_batch", decoder_batch_)}) {
        if (count < 1) {
            fail(SSD_INVALID_ARGUMENT, name, " ", count, " is below 1; use 1 or more");
        }
    }
    check_lookahead();
    tokens_.resize(num_images() * num_tokens());
    place_pixels(params);
}

void Generation::check_lookahead() const {
    if (lookahead_ == SSD_LOOKAHEAD_AUTO || lookahead_ == 0 || lookahead_ == AutoWindow::off) {
        return;
    }
    int64_t const most = model_->config().model.grid.num_tokens();
    if (lookahead_ < 0 || lookahead_ > most) {
        fail(SSD_INVALID_ARGUMENT, "a window of ", lookahead_, " tokens is outside 2 .. ", most,
             "; use 8, or SSD_LOOKAHEAD_AUTO");
    }
    if (!runner_->why_no_window().empty()) {
        fail(SSD_INVALID_ARGUMENT, runner_->why_no_window());
    }
    int64_t const fixed = runner_->fixed_window();
    if (fixed > 0 && lookahead_ > fixed) {
        fail(SSD_INVALID_ARGUMENT, "a pass of these engines has up to ", fixed, " tokens, not ",
             lookahead_, "; use lookahead ", fixed, ", or build-engine --lookahead ", lookahead_);
    }
}

void Generation::place_pixels(ssd_generate_params const& params) {
    size_t const needed = size_t{num_images()} * image_bytes();
    if (params.pixels == nullptr) {
        own_pixels_.resize(needed);
        pixels_ = own_pixels_.data();
        return;
    }
    if (params.pixels_bytes < needed) {
        fail(SSD_INVALID_ARGUMENT, "pixels_bytes=", params.pixels_bytes, " holds no ", num_images(),
             " images; give ", needed, " bytes");
    }
    pixels_ = params.pixels;
}

size_t Generation::num_tokens() const {
    return static_cast<size_t>(model_->config().model.grid.num_tokens());
}

size_t Generation::image_bytes() const {
    ModelConfig const& model = model_->config().model;
    return static_cast<size_t>(model.image_height() * model.image_width()) * 3;
}

void Generation::begin_batch() {
    count_ = std::min(max_batch_, num_images() - first_);
    PromptBatch const batch = requests_.batch(first_, count_);
    lengths_ = batch.lengths;
    runner_->prefill(batch);
    Config const& config = model_->config();
    uint64_t const promised =
        config.policy.cache_bytes(config.model.head_dim, item_bytes(config.dtype),
                                  config.model.rows_per_image * int64_t{count_});
    if (runner_->cache_bytes() != promised) {
        fail(SSD_INTERNAL_ERROR, "the backend holds ", runner_->cache_bytes(),
             " cache bytes, the policy table says ", promised, "; export the bundle again");
    }
    choose_passes(batch);
}

void Generation::choose_passes(PromptBatch const& batch) {
    Config const& config = model_->config();
    ahead_.reset();
    if (lookahead_ > AutoWindow::off) {
        ahead_ = std::make_unique<Lookahead>(*runner_, batch, config, lookahead_);
    }
    // Several images' passes wait for the slowest: they take one token a pass.
    if (lookahead_ != SSD_LOOKAHEAD_AUTO || count_ > 1 || !runner_->why_no_window().empty()) {
        return;
    }
    AutoWindow window(
        PassCost::of(model_->bundle(), runner_->cpu_threads(), runner_->fixed_window(),
                     runner_->opens_again(), runner_->fuses_steps()),
        config.policy.rooms(batch.lengths));
    if (window.could_pay()) {
        ahead_ = std::make_unique<Lookahead>(*runner_, batch, config, std::move(window));
    }
}

bool Generation::step_row(ssd_row_event& event) {
    if (finished_ == num_images()) {
        fill_event(event, static_cast<uint32_t>(model_->config().model.grid.height) - 1);
        return false;
    }
    check_usable();
    try {
        fill_event(event, generate_row());
    } catch (std::exception const&) {
        check_not_cancelled();  // an interrupted backend throws: that is no fault
        has_failed_ = true;
        throw;
    }
    if (row_ == model_->config().model.grid.height) {
        first_ += count_;
        row_ = 0;
    }
    return true;
}

// The number of the row that was generated.
uint32_t Generation::generate_row() {
    Grid const& grid = model_->config().model.grid;
    if (row_ == 0) {
        begin_batch();
    }
    if (ahead_ != nullptr) {
        ahead_->reach((row_ + 1) * grid.width, stop_);
    } else {
        runner_->decode_row(std::max<int64_t>(1, row_ * grid.width), (row_ + 1) * grid.width,
                            stop_);
    }
    if (stop_) {
        throw Failure(SSD_CANCELLED, "cancelled");
    }
    std::vector<int32_t> const tokens = runner_->tokens();
    auto const begin = static_cast<std::ptrdiff_t>(first_ * num_tokens());
    std::copy(tokens.begin(), tokens.end(), tokens_.begin() + begin);
    ++row_;
    if (row_ == grid.height) {
        decode(tokens_.data() + begin, pixels_ + first_ * image_bytes());
        finished_ = first_ + count_;
    } else if (preview_) {
        make_preview();
    }
    return row_ - 1;
}

void Generation::check_not_cancelled() {
    if (stop_ || (stop_after_images_ && row_ == 0)) {
        stop_ = true;
        throw Failure(SSD_CANCELLED, "cancelled; the images that were finished are kept");
    }
}

void Generation::check_usable() {
    check_not_cancelled();
    if (has_failed_) {
        fail(SSD_INTERNAL_ERROR, "this generation failed before; create another one");
    }
}

void Generation::decode(int32_t const* tokens, uint8_t* pixels) {
    for (uint32_t start = 0; start < count_; start += decoder_batch_) {
        runner_->decode_image(tokens + start * num_tokens(),
                              std::min(decoder_batch_, count_ - start),
                              pixels + start * image_bytes());
    }
}

// The rows to come repeat the last one for the decoder's sake and are grayed out.
void Generation::make_preview() {
    ModelConfig const& model = model_->config().model;
    auto const height = static_cast<size_t>(model.grid.height);
    auto const width = static_cast<size_t>(model.grid.width);
    int32_t const* const begin = tokens_.data() + first_ * num_tokens();
    std::vector<int32_t> codes(begin, begin + count_ * num_tokens());
    for (size_t image = 0; image < count_; ++image) {
        int32_t* const tokens = codes.data() + image * num_tokens();
        for (size_t row = row_; row < height; ++row) {
            std::copy_n(tokens + (row_ - 1) * width, width, tokens + row * width);
        }
    }
    preview_pixels_.resize(count_ * image_bytes());
    decode(codes.data(), preview_pixels_.data());
    auto const line = static_cast<size_t>(model.image_width()) * 3;
    size_t const done = static_cast<size_t>(model.image_height()) * row_ / height * line;
    for (size_t image = 0; image < count_; ++image) {
        uint8_t* const pixels = preview_pixels_.data() + image * image_bytes();
        std::memset(pixels + done, not_generated_yet, image_bytes() - done);
    }
}

void Generation::fill_event(ssd_row_event& event, uint32_t row) const {
    ModelConfig const& model = model_->config().model;
    auto const num_rows = static_cast<uint32_t>(model.grid.height);
    bool const is_last_row = row + 1 == num_rows;
    uint32_t const first = std::min(first_, num_images() - count_);
    uint8_t const* const finished = pixels_ + first * image_bytes();
    event.row = row;
    event.num_rows = num_rows;
    event.first_image = first;
    event.num_images = count_;
    event.total_images = num_images();
    event.num_tokens = static_cast<uint32_t>(num_tokens());
    event.done = is_last_row && finished_ == num_images() ? 1 : 0;
    auto const steps = (row + 1) * static_cast<uint32_t>(model.grid.width) - 1;
    event.passes = ahead_ != nullptr ? ahead_->passes() : steps;
    event.tokens = tokens_.data() + first * num_tokens();
    event.pixels = is_last_row ? finished : preview_ ? preview_pixels_.data() : nullptr;
    event.width = static_cast<uint32_t>(model.image_width());
    event.height = static_cast<uint32_t>(model.image_height());
}

void Generation::run() {
    ssd_row_event event{};
    event.struct_size = sizeof event;
    while (step_row(event)) {
        if (on_row_ == nullptr) {
            continue;
        }
        int answer = 0;
        try {
            answer = on_row_(&event, user_data_);
        } catch (std::exception const& error) {
            fail(SSD_CALLBACK_FAILED, "the row callback threw an exception (", error.what(),
                 "); catch it there and return non-zero to stop");
        } catch (...) {
            fail(SSD_CALLBACK_FAILED,
                 "the row callback threw an exception; catch it there and return non-zero to stop");
        }
        if (answer != 0 && event.done == 0) {
            cancel(SSD_CANCEL_NOW);
        }
    }
}

void Generation::cancel(int32_t when) {
    if (when == SSD_CANCEL_AFTER_IMAGES) {
        stop_after_images_ = true;
        return;
    }
    stop_ = true;
    runner_->interrupt();
}

ssd_images Generation::images() const {
    ModelConfig const& model = model_->config().model;
    ssd_images images{};
    images.num_images = finished_;
    images.width = static_cast<uint32_t>(model.image_width());
    images.height = static_cast<uint32_t>(model.image_height());
    images.num_tokens = static_cast<uint32_t>(num_tokens());
    images.pixels = pixels_;
    images.tokens = tokens_.data();
    return images;
}

ssd_cache_report Generation::cache_report() const {
    if (lengths_.empty()) {
        fail(SSD_INVALID_ARGUMENT,
             "no cache is allocated before the first row is generated; generate a row first");
    }
    Config const& config = model_->config();
    PolicyTable const& table = config.policy;
    size_t const item = item_bytes(config.dtype);
    int64_t const head_dim = config.model.head_dim, rows = config.model.rows_per_image;
    ssd_cache_report report{};
    report.num_images = count_;
    report.bytes = runner_->cache_bytes();
    report.step_is_captured = runner_->step_is_captured() ? 1 : 0;
    report.image_bytes_per_image = table.image_cache_bytes(head_dim, item, rows);
    report.full_image_bytes_per_image =
        table.full_cache_bytes(head_dim, item, rows, config.model.grid.num_tokens());
    for (int64_t row = 0; row < rows; ++row) {  // of the first image
        report.tokens_evicted += table.tokens_evicted(lengths_[static_cast<size_t>(row) * count_]);
    }
    return report;
}

}  // namespace ssd_runtime
