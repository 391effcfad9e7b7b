// Compiled without fused multiply-add, so that a window is chosen as Python chooses it.
#include "auto_window.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include <nlohmann/json.hpp>

#include "failure.h"
#include "files.h"

namespace ssd_runtime {
namespace {

constexpr int64_t operators_of_a_layer = 65;
constexpr int64_t operators_of_a_fused_layer = 8;  // of a step with the operators of ../operators
constexpr uint64_t glance = 1024;                  // numbers of a matrix
constexpr uint32_t lost_bits = 0x1FFF;             // of a float32 that float16 has not
constexpr double more_operators = 1.9;             // of a pass than of a step
constexpr int64_t operators_of_an_eviction = 13;   // of a head group, in an evict graph
constexpr double has_to_save = 0.05;  // of a step's time, for what the model does not know
constexpr int64_t remembered = 32;    // drafts before the newest one that count
constexpr double opening_steps = 30;  // of a graph where only one is open at a time, in steps
constexpr double shares = 20;         // of which the share of right drafts is a multiple

struct Rates {
    double bandwidth, matrix_rate, op;
};
constexpr Rates core{15e9, 60e9, 1.7e-6}, gpu{1e12, 50e12, 3e-6};
constexpr int cores_of_bandwidth = 3;  // more read no faster

// Gathered from row by row, read by the prompt alone, or of the image decoder.
char const* const not_of_a_step[] = {"language_model.embed_tokens.weight", "generation_embeddings.",
                                     "caption_projection.", "vqmodel."};

// Bytes of the weights that a step multiplies by, and how many less the operators of ../operators
// read of them: half of float32 matrices that came in two bytes a number.
struct WeightBytes {
    int64_t read = 0, packed = 0;
};

// Whether the first numbers of a float32 tensor have the bits of float16 alone.
bool came_in_two_bytes(std::byte const* numbers, uint64_t count) {
    uint32_t seen = 0;
    for (uint64_t i = 0; i < std::min(count, glance); ++i) {
        uint32_t bits = 0;
        std::memcpy(&bits, numbers + i * sizeof bits, sizeof bits);
        seen |= bits;
    }
    return (seen & lost_bits) == 0;
}

// From the header of the weights file.
WeightBytes weight_bytes(Bundle const& bundle) {
    std::string const& name = bundle.config().text_embeddings.file;
    MappedFile const file(bundle.file(name));
    uint64_t length = 0;
    if (file.size() >= sizeof length) {
        std::memcpy(&length, file.data(), sizeof length);
    }
    if (length == 0 || length > file.size() - sizeof length) {
        fail(SSD_BAD_BUNDLE, "bundle ", bundle.path(), ": ", name,
             " has no header; export it again with --force");
    }
    auto const* text = reinterpret_cast<char const*>(file.data()) + sizeof length;
    WeightBytes bytes;
    std::byte const* const data = file.data() + sizeof length + length;
    try {
        auto const header = nlohmann::json::parse(text, text + length);
        for (auto const& [tensor, entry] : header.items()) {
            bool const counts = tensor != "__metadata__" &&
                                std::none_of(std::begin(not_of_a_step), std::end(not_of_a_step),
                                             [&tensor = tensor](char const* beginning) {
                                                 return tensor.rfind(beginning, 0) == 0;
                                             });
            if (counts) {
                auto const& offsets = entry.at("data_offsets");
                using Offset = nlohmann::json::number_unsigned_t;  // get_ref throws for another
                uint64_t const begin = offsets.at(0).get_ref<Offset const&>();
                uint64_t const end = offsets.at(1).get_ref<Offset const&>();
                if (begin > end || end > file.size() - sizeof length - length) {
                    fail(SSD_BAD_BUNDLE, "bundle ", bundle.path(), ": ", name, " has no ", tensor,
                         "; export it again with --force");
                }
                bytes.read += static_cast<int64_t>(end - begin);
                if (entry.at("dtype") == "F32" && entry.at("shape").size() == 2 &&
                    came_in_two_bytes(data + begin, (end - begin) / sizeof(float))) {
                    bytes.packed += static_cast<int64_t>((end - begin) / 2);
                }
            }
        }
    } catch (nlohmann::json::exception const&) {
        fail(SSD_BAD_BUNDLE, "bundle ", bundle.path(), ": the header of ", name,
             " is damaged; export it again with --force");
    }
    return bytes;
}

// Float operations of a decode step of one image.
int64_t step_operations(Config const& config) {
    ModelConfig const& model = config.model;
    int64_t const hidden = model.hidden_size;
    int64_t const attention = hidden * model.head_dim * 2 * (model.num_heads + model.num_kv_heads);
    int64_t weights = model.num_layers * (attention + 3 * hidden * model.intermediate_size);
    weights += hidden * hidden + hidden * model.codebook_size;  // the generation head
    int64_t const embedded = model.codebook_dim * hidden + hidden * hidden;
    int64_t slots = 0;
    for (auto const& groups : config.policy.layers) {
        for (HeadGroup const& group : groups) {
            slots += group.num_heads * group.num_slots;
        }
    }
    int64_t const attended = 2 * slots * (model.num_heads / model.num_kv_heads) * model.head_dim;
    return 2 * (model.rows_per_image * (weights + attended) + embedded);
}

// Evictions of head groups between steps, for each token.
double evictions_a_token(PolicyTable const& table) {
    double sum = 0;
    for (auto const& groups : table.layers) {
        for (HeadGroup const& group : groups) {
            if (group.evict_every > 1 && table.can_fill(group)) {
                sum += 1 / static_cast<double>(group.evict_every);
            }
        }
    }
    return sum;
}

}  // namespace

PassCost PassCost::of(Bundle const& bundle, int cpu_threads, int64_t fixed, bool opens_again,
                      bool fuses_steps) {
    Config const& config = bundle.config();
    Rates rates = gpu;
    if (cpu_threads > 0) {
        rates = {core.bandwidth * std::min(cpu_threads, cores_of_bandwidth),
                 core.matrix_rate * cpu_threads, core.op};
    }
    auto const cache = static_cast<int64_t>(config.policy.cache_bytes(
        config.model.head_dim, item_bytes(config.dtype), config.model.rows_per_image));
    WeightBytes const weights = weight_bytes(bundle);
    double saved = 0;
    double evicting = 0;
    int64_t num_bytes = weights.read + cache;
    if (fuses_steps) {
        int64_t const fewer =
            (operators_of_a_layer - operators_of_a_fused_layer) * config.model.num_layers;
        saved = static_cast<double>(fewer) * rates.op;
        evicting = operators_of_an_eviction * evictions_a_token(config.policy) * rates.op;
        num_bytes -= weights.packed;  // of a pass, too
    }
    return {static_cast<double>(operators_of_a_layer * config.model.num_layers) * rates.op,
            static_cast<double>(num_bytes) / rates.bandwidth,
            static_cast<double>(step_operations(config)) / rates.matrix_rate,
            fixed,
            opens_again ? opening_steps : 0,
            saved,
            evicting};
}

double PassCost::of_window(int64_t window) const {
    auto const tokens = static_cast<double>(std::max(window, fixed));
    return more_operators * overhead + moving + tokens * computing;
}

std::vector<int64_t> PassCost::windows() const {
    return fixed > 0 ? std::vector<int64_t>{fixed} : std::vector<int64_t>{4, 6, 8, 12, 16, 24};
}

int64_t AutoWindow::at(int64_t step) {
    auto const rounded = static_cast<int64_t>(std::nearbyint(share_ * shares));
    auto found = best_.find(rounded);
    if (found == best_.end()) {
        found = best_.emplace(rounded, choose(static_cast<double>(rounded) / shares)).first;
    }
    auto const num_steps = static_cast<double>(rooms_.size());
    double const saved =
        found->second.saved * ((num_steps - static_cast<double>(step)) / num_steps);
    bool const is_worth_it = saved > (window_ == off ? cost_.opening : -cost_.opening);
    window_ = is_worth_it ? found->second.window : off;
    return window_;
}

void AutoWindow::drafts(int64_t right, bool then_wrong) {
    for (int64_t draft = 0; draft < right + (then_wrong ? 1 : 0); ++draft) {
        double const was_right = draft < right ? 1.0 : 0.0;
        share_ += (was_right - share_) / static_cast<double>(counted_ + 1);
        counted_ = std::min(counted_ + 1, remembered);
    }
}

AutoWindow::Choice AutoWindow::choose(double share) const {
    int64_t best = off;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t const window : cost_.windows()) {
        double seconds = 0;
        double step = 1;
        while (step < static_cast<double>(rooms_.size())) {
            int64_t const width = std::min(window, rooms_[static_cast<size_t>(step)]);
            seconds += cost_.of_window(width);
            double gained = 0;
            for (int64_t place = 0; place < width; ++place) {
                gained += std::pow(share, static_cast<double>(place));
            }
            step += gained;
        }
        seconds += cost_.evicting * static_cast<double>(rooms_.size() - 1);
        if (seconds < least) {
            least = seconds;
            best = window;
        }
    }
    double const limit = (1 - has_to_save) * static_cast<double>(rooms_.size() - 1) * cost_.step();
    return {best, (limit - least) / cost_.step()};
}

}  // namespace ssd_runtime
