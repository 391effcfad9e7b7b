// Compiled without fused multiply-add, so that a window is chosen as Python chooses it.
#include "auto_window.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include "failure.h"
#include "files.h"
#include "json_reader.h"

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

// Whether the first numbers of a float32 tensor have the bits of float16 alone.
bool came_in_two_bytes(std::string_view numbers) {
    uint32_t seen = 0;
    for (uint64_t i = 0; i < std::min<uint64_t>(numbers.size() / sizeof(float), glance); ++i) {
        uint32_t bits = 0;
        std::memcpy(&bits, numbers.data() + i * sizeof bits, sizeof bits);
        seen |= bits;
    }
    return (seen & lost_bits) == 0;
}

// Where a tensor lies behind the header. Throws for a place that is not in the file.
std::string_view tensor_in(std::string_view data, nlohmann::ordered_json const& entry) {
    using Offset = nlohmann::ordered_json::number_unsigned_t;  // get_ref throws for another
    auto const& offsets = entry.at("data_offsets");
    uint64_t const begin = offsets.at(0).get_ref<Offset const&>();
    uint64_t const end = offsets.at(1).get_ref<Offset const&>();
    if (begin > end || end > data.size()) {
        throw std::out_of_range("a tensor that is not in the file");
    }
    return data.substr(begin, end - begin);
}

void count(std::string const& tensor, std::string_view data, nlohmann::ordered_json const& entry,
           WeightBytes& bytes) {
    bool const is_skipped =
        tensor == "__metadata__" ||
        std::any_of(std::begin(not_of_a_step), std::end(not_of_a_step),
                    [&tensor](char const* beginning) { return tensor.rfind(beginning, 0) == 0; });
    if (is_skipped) {
        return;
    }
    std::string_view const content = tensor_in(data, entry);
    bytes.read += content.size();
    if (entry.at("dtype") == "F32" && entry.at("shape").size() == 2 && came_in_two_bytes(content)) {
        bytes.packed += content.size() / 2;
    }
}

}  // namespace

WeightBytes weight_bytes(std::string_view file, std::string const& name,
                         std::string const& bundle) {
    uint64_t length = 0;
    if (file.size() >= sizeof length) {
        std::memcpy(&length, file.data(), sizeof length);
    }
    if (length == 0 || length > file.size() - sizeof length) {
        fail(SSD_BAD_BUNDLE, "bundle ", bundle, ": ", name,
             " has no header; export it again with --force");
    }
    WeightBytes bytes;
    try {
        auto const header = parse_json(file.substr(sizeof length, length));
        for (auto const& [tensor, entry] : header.items()) {
            count(tensor, file.substr(sizeof length + length), entry, bytes);
        }
    } catch (std::bad_alloc const&) {
        throw;
    } catch (std::exception const&) {
        fail(SSD_BAD_BUNDLE, "bundle ", bundle, ": the header of ", name,
             " is damaged; export it again with --force");
    }
    return bytes;
}

double step_operations(Config const& config) {
    ModelConfig const& model = config.model;
    int64_t const hidden = model.hidden_size;
    int64_t const attention = hidden * model.head_dim * 2 * (model.num_heads + model.num_kv_heads);
    int64_t weights = model.num_layers * (attention + 3 * hidden * model.intermediate_size);
    weights += hidden * hidden + hidden * model.codebook_size;  // the generation head
    int64_t const embedded = model.codebook_dim * hidden + hidden * hidden;
    double slots = 0;  // exact up to 2^53, and nothing overflows
    for (auto const& groups : config.policy.layers) {
        for (HeadGroup const& group : groups) {
            slots += static_cast<double>(group.num_heads * group.num_slots);
        }
    }
    auto const rows = static_cast<double>(model.rows_per_image);
    auto const width = static_cast<double>(model.num_heads / model.num_kv_heads * model.head_dim);
    return 2 * (rows * (static_cast<double>(weights) + 2 * slots * width) +
                static_cast<double>(embedded));
}

namespace {

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
    uint64_t const cache = config.policy.cache_bytes(
        config.model.head_dim, item_bytes(config.dtype), config.model.rows_per_image);
    std::string const& name = config.text_embeddings.file;
    MappedFile const file(bundle.file(name));
    WeightBytes const weights = weight_bytes(
        {reinterpret_cast<char const*>(file.data()), file.size()}, name, bundle.path());
    double saved = 0;
    double evicting = 0;
    uint64_t num_bytes = weights.read + cache;
    if (fuses_steps) {
        int64_t const fewer =
            (operators_of_a_layer - operators_of_a_fused_layer) * config.model.num_layers;
        saved = static_cast<double>(fewer) * rates.op;
        evicting = operators_of_an_eviction * evictions_a_token(config.policy) * rates.op;
        num_bytes -= weights.packed;  // of a pass, too
    }
    return {static_cast<double>(operators_of_a_layer * config.model.num_layers) * rates.op,
            static_cast<double>(num_bytes) / rates.bandwidth,
            step_operations(config) / rates.matrix_rate,
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
