#include "trt/prompt_rows.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <set>
#include <string_view>
#include <unordered_map>

namespace ssd_runtime {
namespace {

// Neighboring rows of a batch whose prompts are equally long: computed in this order from one place
// on, or all the one at that place.
struct PromptRun {
    size_t first, count, place;
    bool is_one_prompt;
    size_t length;
};

// The runs of a batch, in order, each as long as it can be.
std::vector<PromptRun> prompt_runs(std::vector<size_t> const& place,
                                   std::vector<int32_t> const& lengths) {
    std::vector<PromptRun> runs;
    for (size_t first = 0, last = 0; first < place.size(); first = last) {
        size_t const next = first + 1 < place.size() ? place[first + 1] : place[first] + 1;
        bool const is_one = next == place[first];
        size_t const step = is_one ? 0 : 1;
        last = first + 1;
        while (last < place.size() && place[last] == place[last - 1] + step &&
               lengths[last] == lengths[first]) {
            ++last;
        }
        runs.push_back({first, last - first, place[first], is_one && last - first > 1,
                        static_cast<size_t>(lengths[first])});
    }
    return runs;
}

// Repeats the first `count` rows of a run to its end, twice as many in each copy.
void add_doubled(PromptRun const& run, size_t count, std::vector<RowCopy>& copies) {
    while (count < run.count) {
        size_t const some = std::min(count, run.count - count);
        copies.push_back({run.first + count, run.first, some, run.length, false});
        count += some;
    }
}

// Copies the first `count` rows of a run from where they were computed, the last ones first and so
// many at once that no copy reads what it writes.
void add_moved(PromptRun const& run, size_t count, std::vector<RowCopy>& copies) {
    size_t const distance = run.first - run.place;
    size_t end = distance > 0 ? run.first + count : run.first;
    while (end > run.first) {
        size_t const some = std::min(distance, end - run.first);
        end -= some;
        copies.push_back({end, end - distance, some, run.length, false});
    }
}

// (the first row of each prompt; for every row the place of its prompt among those)
PromptRows different_rows(PromptBatch const& batch) {
    PromptRows rows;
    std::unordered_map<std::string_view, size_t> places;
    size_t const row_size = batch.embeds.size() / batch.lengths.size();
    size_t const token_size = row_size / static_cast<size_t>(batch.width);
    for (size_t row = 0; row < batch.lengths.size(); ++row) {
        auto const* const begin =
            reinterpret_cast<char const*>(batch.embeds.data() + row * row_size);
        size_t const size = static_cast<size_t>(batch.lengths[row]) * token_size * sizeof(float);
        auto const [found, is_new] = places.emplace(std::string_view(begin, size), places.size());
        if (is_new) {
            rows.computed.push_back(row);
        }
        rows.place.push_back(found->second);
    }
    return rows;
}

}  // namespace

std::vector<int64_t> prompt_sizes(int64_t num_images) {
    std::set<int64_t> const sizes = {1, num_images / 2 + 1, (3 * num_images + 3) / 4, num_images};
    return {sizes.begin(), sizes.end()};
}

PromptRows rows_to_compute(PromptBatch const& batch, std::vector<int64_t> const& sizes) {
    PromptRows rows = different_rows(batch);
    size_t const num_rows = batch.lengths.size();
    size_t const rows_per_image = num_rows / batch.images.size();
    for (int64_t const images : sizes) {
        size_t const room = rows_per_image * static_cast<size_t>(images);
        if (room < num_rows && room >= rows.computed.size()) {
            rows.computed.resize(room, rows.computed.back());
            return rows;
        }
    }
    rows.computed.resize(num_rows);
    std::iota(rows.computed.begin(), rows.computed.end(), size_t{0});
    rows.place = rows.computed;
    return rows;
}

std::vector<int32_t> draw_tokens(std::vector<float> const& logits, std::vector<float> const& noise,
                                 size_t codebook_size, Sampling const& sampling) {
    size_t const images = noise.size() / codebook_size;
    bool const is_guided = logits.size() > noise.size();
    auto const top_k = static_cast<size_t>(sampling.top_k);
    std::vector<int32_t> tokens;
    std::vector<float> guided(codebook_size), race(codebook_size);
    for (size_t image = 0; image < images; ++image) {
        float const* const with = logits.data() + image * codebook_size;
        float const* const without = with + (is_guided ? noise.size() : 0);
        float const* const gumbel = noise.data() + image * codebook_size;
        for (size_t code = 0; code < codebook_size; ++code) {
            float const u = without[code];
            guided[code] = is_guided ? u + sampling.cfg_scale * (with[code] - u) : with[code];
            race[code] = guided[code] + sampling.temperature * gumbel[code];
        }
        if (top_k > 0 && top_k < codebook_size) {
            std::vector<float> sorted = guided;
            auto const least = sorted.begin() + static_cast<std::ptrdiff_t>(top_k - 1);
            std::nth_element(sorted.begin(), least, sorted.end(), std::greater<>());
            for (size_t code = 0; code < codebook_size; ++code) {
                if (guided[code] < *least) {
                    race[code] = -std::numeric_limits<float>::infinity();
                }
            }
        }
        tokens.push_back(
            static_cast<int32_t>(std::max_element(race.begin(), race.end()) - race.begin()));
    }
    return tokens;
}

std::vector<RowCopy> copies_from_prompts(std::vector<size_t> const& place,
                                         std::vector<int32_t> const& lengths) {
    std::vector<RowCopy> copies;
    for (PromptRun const& run : prompt_runs(place, lengths)) {
        size_t const count = run.is_one_prompt ? 1 : run.count;
        copies.push_back({run.first, run.place, count, run.length, true});
        add_doubled(run, count, copies);
    }
    return copies;
}

// The last runs first: a prompt's place among those computed is never behind its first row, so what
// a later run is copied from has not been overwritten.
std::vector<RowCopy> copies_in_place(std::vector<size_t> const& place, size_t num_tokens) {
    std::vector<int32_t> const padded(place.size(), static_cast<int32_t>(num_tokens));
    std::vector<PromptRun> const runs = prompt_runs(place, padded);
    std::vector<RowCopy> copies;
    for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
        size_t const count = run->is_one_prompt ? 1 : run->count;
        add_moved(*run, count, copies);
        add_doubled(*run, count, copies);
    }
    return copies;
}

}  // namespace ssd_runtime
