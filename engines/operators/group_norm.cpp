// Compiled once for each instruction set, SSD_SET being its namespace. Nothing of the standard
// library, whose inline functions the linker would take from any of the sets.
#include "group_norm.h"

#include "kernels.h"
#include "lanes.h"

namespace ssd_operators::SSD_SET {
namespace {

constexpr int chunk = 16;  // places whose numbers stay in the nearest cache

// The numbers of a vector of channels of a place. at: of the first of them.
enum class From { x, codes, scaled, both };
template <From from>
inline Lanes number(Feature const& feature, int64_t at, int channel) {
    if (from == From::x) {
        return load(feature.x + at);
    }
    Lanes found = load(feature.codes + at);
    if (from != From::codes) {
        found = found * load(feature.scale + channel) + load(feature.offset + channel);
    }
    return from == From::both ? load(feature.x + at) + found : found;
}

// The sums of `count` places of num_vectors vectors of channels from a channel on.
template <From from, int num_vectors>
inline void measure_tile(Feature const& feature, int64_t first, int count, int channels,
                         int channel, float const* pivot, float* kept, float* totals) {
    Lanes sums[num_vectors], squares[num_vectors];
    for (int i = 0; i < num_vectors; ++i) {
        sums[i] = load(totals + channel + i * num_lanes);
        squares[i] = load(totals + channels + channel + i * num_lanes);
    }
    for (int place = 0; place < count; ++place) {
        int64_t const at = (first + place) * channels + channel;
#pragma GCC unroll 4
        for (int i = 0; i < num_vectors; ++i) {
            int const lane = i * num_lanes;
            Lanes const found = number<from>(feature, at + lane, channel + lane);
            if (kept != nullptr) {
                store(found, kept + at + lane);
            }
            Lanes const moved = found - load(pivot + channel + lane);
            sums[i] += moved;
            squares[i] += moved * moved;
        }
    }
    for (int i = 0; i < num_vectors; ++i) {
        store(sums[i], totals + channel + i * num_lanes);
        store(squares[i], totals + channels + channel + i * num_lanes);
    }
}

template <From from>
void measure_of(Feature const& feature, int64_t num_places, int channels, float const* pivot,
                float* kept, float* totals) {
    std::memset(totals, 0, sizeof(float) * 2 * static_cast<size_t>(channels));
    for (int64_t first = 0; first < num_places; first += chunk) {
        int const count = static_cast<int>(num_places - first < chunk ? num_places - first : chunk);
        int channel = 0;
        for (; channel + 4 * num_lanes <= channels; channel += 4 * num_lanes) {
            measure_tile<from, 4>(feature, first, count, channels, channel, pivot, kept, totals);
        }
        for (; channel < channels; channel += num_lanes) {
            measure_tile<from, 1>(feature, first, count, channels, channel, pivot, kept, totals);
        }
    }
}

template <From from, bool is_silu>
inline Lanes finished(Feature const& feature, Finish const& finish, int64_t at, int channel) {
    Lanes const x = number<from>(feature, at, channel) * load(finish.factor + channel) +
                    load(finish.shift + channel);
    return is_silu ? silu(x) : x;
}

template <From from, bool is_silu>
void channels_first(Feature const& feature, int64_t num_places, int channels, Finish const& finish,
                    float* out) {
    float tile[chunk][num_lanes];
    for (int64_t first = 0; first < num_places; first += chunk) {
        int const count = static_cast<int>(num_places - first < chunk ? num_places - first : chunk);
        for (int channel = 0; channel < channels; channel += num_lanes) {
            for (int place = 0; place < count; ++place) {
                int64_t const at = (first + place) * channels + channel;
                store(finished<from, is_silu>(feature, finish, at, channel), tile[place]);
            }
            for (int lane = 0; lane < num_lanes; ++lane) {
                float* const plane = out + (channel + lane) * finish.plane + first;
                for (int place = 0; place < count; ++place) {
                    plane[place] = tile[place][lane];
                }
            }
        }
    }
}

template <From from, bool is_silu>
void finish_of(Feature const& feature, int64_t num_places, int channels, Finish const& finish,
               void* out) {
    if (finish.plane != 0) {
        channels_first<from, is_silu>(feature, num_places, channels, finish,
                                      static_cast<float*>(out));
        return;
    }
    for (int64_t place = 0; place < num_places; ++place) {
        for (int channel = 0; channel < channels; channel += num_lanes) {
            int64_t const at = place * channels + channel;
            Lanes const x = finished<from, is_silu>(feature, finish, at, channel);
            if (finish.inverse != nullptr) {
                store_rounded(x * load(finish.inverse + channel) + finish.zero_point,
                              static_cast<uint8_t*>(out) + at);
            } else {
                store(x, static_cast<float*>(out) + at);
            }
        }
    }
}

template <bool is_silu>
void finish_with(Feature const& feature, int64_t num_places, int channels, Finish const& finish,
                 void* out) {
    auto* const of = feature.codes == nullptr   ? finish_of<From::x, is_silu>
                     : feature.x != nullptr     ? finish_of<From::both, is_silu>
                     : feature.scale != nullptr ? finish_of<From::scaled, is_silu>
                                                : finish_of<From::codes, is_silu>;
    of(feature, num_places, channels, finish, out);
}

}  // namespace

void measure(Feature const& feature, int64_t num_places, int channels, float const* pivot,
             float* kept, float* totals) {
    auto* const of = feature.codes == nullptr   ? measure_of<From::x>
                     : feature.x != nullptr     ? measure_of<From::both>
                     : feature.scale != nullptr ? measure_of<From::scaled>
                                                : measure_of<From::codes>;
    of(feature, num_places, channels, pivot, kept, totals);
}

void finish(Feature const& feature, int64_t num_places, int channels, Finish const& how,
            void* out) {
    (how.silu ? finish_with<true> : finish_with<false>)(feature, num_places, channels, how, out);
}

}  // namespace ssd_operators::SSD_SET
