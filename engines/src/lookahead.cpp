// Compiled without fused multiply-add, so that drafts are chosen as Python chooses them.
#include "lookahead.h"

#include <algorithm>

namespace ssd_runtime {
namespace {

constexpr double memory = 0.8;  // of how often a guess was right: about the last five tokens count

}  // namespace

Drafts::Drafts(size_t num_images, Grid const& grid)
    : grid_width_(grid.width), num_tokens_(grid.num_tokens()) {
    auto const size = static_cast<size_t>(num_tokens_);
    images_.assign(num_images,
                   {std::vector<int32_t>(size, none), std::vector<int32_t>(size, none)});
}

void Drafts::sampled(std::vector<int64_t> const& first, SampledWindow const& sampled) {
    size_t const width = sampled.tokens.size() / images_.size();
    for (size_t i = 0; i < images_.size(); ++i) {
        Image& image = images_[i];
        int32_t const* const samples = sampled.tokens.data() + i * width;
        int64_t const kept = sampled.kept[i];
        for (int64_t place = 0; place < kept; ++place) {
            int64_t const step = first[i] + place;
            std::array<int32_t, num_sources> const found = guesses(image, step);
            for (size_t source = 0; source < num_sources; ++source) {
                if (found[source] != none) {
                    double const is_right = found[source] == samples[place] ? 1.0 : 0.0;
                    image.right[source] = memory * image.right[source] + (1 - memory) * is_right;
                }
            }
            image.tokens[static_cast<size_t>(step)] = samples[place];
        }
        int64_t const end = std::min(first[i] + static_cast<int64_t>(width), num_tokens_);
        for (int64_t step = first[i] + kept; step < end; ++step) {
            image.previous[static_cast<size_t>(step)] = samples[step - first[i]];
        }
    }
}

std::vector<int32_t> Drafts::inputs(std::vector<int64_t> const& first, int64_t width) {
    std::vector<int32_t> inputs(images_.size() * static_cast<size_t>(width), 0);
    for (size_t i = 0; i < images_.size(); ++i) {
        Image& image = images_[i];
        auto const out = inputs.begin() + static_cast<int64_t>(i) * width;
        if (first[i] == num_tokens_) {
            std::fill_n(out, width, image.tokens[static_cast<size_t>(num_tokens_) - 2]);
            continue;
        }
        int64_t const end = std::min(first[i] + width - 1, num_tokens_);
        for (int64_t step = first[i]; step < end; ++step) {  // a draft stands where its token will
            image.tokens[static_cast<size_t>(step)] = best(image, step);
        }
        std::copy(image.tokens.begin() + first[i] - 1, image.tokens.begin() + end, out);
    }
    return inputs;
}

// Of a position whose neighbors before it are there; none where it has not that one.
std::array<int32_t, Drafts::num_sources> Drafts::guesses(Image const& image, int64_t step) const {
    auto const place = static_cast<size_t>(step);
    auto const row = static_cast<size_t>(grid_width_);
    return {step >= 1 ? image.tokens[place - 1] : none,
            step >= grid_width_ ? image.tokens[place - row] : none, image.previous[place]};
}

int32_t Drafts::best(Image const& image, int64_t step) const {
    std::array<int32_t, num_sources> const found = guesses(image, step);
    size_t chosen = left;
    for (size_t source : {above, previous}) {
        if (found[source] != none && image.right[source] > image.right[chosen]) {
            chosen = source;
        }
    }
    return found[chosen];
}

WindowNoise::WindowNoise(PromptBatch const& batch, ModelConfig const& model, int64_t widest)
    : grid_(model.grid),
      codebook_(static_cast<size_t>(model.codebook_size)),
      num_rows_(1 + (widest - 1 + model.grid.width - 1) / model.grid.width),
      is_greedy_(batch.sampling.temperature == 0),
      images_(batch.images),
      next_row_(images_.size(), 0),
      rings_(images_.size()) {}

std::vector<float> WindowNoise::of(std::vector<int64_t> const& first, int64_t width) {
    std::vector<float> noise(images_.size() * static_cast<size_t>(width) * codebook_, 0.0F);
    int64_t const ring_size = num_rows_ * grid_.width;
    for (size_t image = 0; image < images_.size() && !is_greedy_; ++image) {
        reach(image, first[image] + width - 1);
        for (int64_t place = 0; place < width; ++place) {
            auto const from = static_cast<size_t>((first[image] + place) % ring_size);
            size_t const to = image * static_cast<size_t>(width) + static_cast<size_t>(place);
            std::copy_n(rings_[image].data() + from * codebook_, codebook_,
                        noise.data() + to * codebook_);
        }
    }
    return noise;
}

// Makes the rows of an image up to that of a step.
void WindowNoise::reach(size_t image, int64_t step) {
    int64_t const last = std::min(step / grid_.width, grid_.height - 1);
    rings_[image].resize(static_cast<size_t>(num_rows_ * grid_.width) * codebook_);
    for (int64_t& row = next_row_[image]; row <= last; ++row) {
        auto const start = static_cast<size_t>(row % num_rows_ * grid_.width) * codebook_;
        fill_noise({images_[image]}, codebook_, row * grid_.width, grid_.width,
                   rings_[image].data() + start);
    }
}

Lookahead::Lookahead(Runner& runner, PromptBatch const& batch, Config const& config, int64_t window)
    : runner_(runner),
      window_(window),
      num_tokens_(config.model.grid.num_tokens()),
      first_(batch.images.size(), 0),
      noise_(batch, config.model, window),
      drafts_(batch.images.size(), config.model.grid) {
    size_t const images = batch.images.size();
    for (size_t image = 0; image < images; ++image) {
        std::vector<int32_t> lengths;
        for (size_t row = image; row < batch.lengths.size(); row += images) {
            lengths.push_back(batch.lengths[row]);
        }
        rooms_.push_back(config.policy.rooms(lengths));
        rooms_.back().push_back(0);  // after the last step
    }
    std::vector<int32_t> const tokens = runner.tokens();
    SampledWindow prefilled{{}, std::vector<int64_t>(images, 1)};
    for (size_t image = 0; image < images; ++image) {
        prefilled.tokens.push_back(tokens[image * static_cast<size_t>(num_tokens_)]);
    }
    take(prefilled);
}

Lookahead::Lookahead(Runner& runner, PromptBatch const& batch, Config const& config,
                     AutoWindow window)
    : Lookahead(runner, batch, config, std::min(window.widest(), config.model.grid.num_tokens())) {
    auto_ = std::make_unique<AutoWindow>(std::move(window));
}

void Lookahead::reach(int64_t end, std::atomic<bool> const& stop) {
    while (!stop && *std::min_element(first_.begin(), first_.end()) < end) {
        if (auto_ != nullptr) {
            window_ = auto_->at(first_[0]);
        }
        window_ == AutoWindow::off ? step() : pass();
        ++passes_;
    }
}

void Lookahead::pass() {
    Window window{first_, {}, {}, nullptr};
    for (size_t image = 0; image < first_.size(); ++image) {
        window.limit.push_back(
            std::min(rooms_[image][static_cast<size_t>(first_[image])], window_));
    }
    int64_t const width = *std::max_element(window.limit.begin(), window.limit.end());
    window.inputs = drafts_.inputs(first_, width);
    window.noise = [this, width] { return noise_.of(first_, width); };
    SampledWindow const sampled = runner_.decode_window(window);
    if (auto_ != nullptr) {
        auto_->drafts(sampled.kept[0] - 1, sampled.kept[0] < window.limit[0]);
    }
    take(sampled);
}

// A decode step of the one image; its draft is compared with what is sampled, too.
void Lookahead::step() {
    int64_t const here = first_[0];
    int32_t const draft = drafts_.inputs(first_, 2)[1];
    std::atomic<bool> const never{false};
    runner_.decode_row(here, here + 1, never);
    int32_t const token = runner_.tokens()[static_cast<size_t>(here)];
    auto_->drafts(token == draft ? 1 : 0, token != draft);
    take({{token}, {1}});
}

void Lookahead::take(SampledWindow const& sampled) {
    drafts_.sampled(first_, sampled);
    for (size_t image = 0; image < first_.size(); ++image) {
        first_[image] += sampled.kept[image];
    }
}

}  // namespace ssd_runtime
