// Attention of one head over its slots. Compiled once for each instruction set, SSD_SET being its
// name; nothing of the standard library, whose inline functions the linker would take from any of
// the sets.
#include "cache_rows.h"
#include "kernels.h"
#include "lanes.h"

namespace ssd_operators {
namespace {

constexpr float masked = -3.0e38F;
constexpr float negligible = 0x1p-40F;  // of a head's attention: far below what a sum rounds off
constexpr float least_normal = 0x1p-126F;
constexpr float unmoved = 0x1p-100F;  // a score that nothing below least_normal changes
constexpr int ahead = 8;              // value rows that are on their way

// Lane i is a[i] + a[i + half] or, where i has the bit half, b[i - half] + b[i].
template <int half, int... lane>
inline Lanes paired(Lanes a, Lanes b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, ((lane & half) != 0 ? num_lanes + lane : lane)...) +
           __builtin_shufflevector(a, b,
                                   ((lane & half) != 0 ? num_lanes + lane - half : lane + half)...);
}

// Lane i becomes the sum of sums[i], which are used up.
template <int half = 1>
inline Lanes sums_across(Lanes* sums) {
    if constexpr (half < num_lanes) {
        for (int i = 0; i < num_lanes; i += 2 * half) {
            sums[i] =
                paired<half>(sums[i], sums[i + half], std::make_integer_sequence<int, num_lanes>());
        }
        return sums_across<2 * half>(sums);
    }
    return sums[0];
}

inline float sum_of(Lanes lanes) {
    float sum = 0;
    for (int i = 0; i < num_lanes; ++i) {
        sum += lanes[i];
    }
    return sum;
}

inline float greatest_of(Lanes lanes) {
    float greatest = lanes[0];
    for (int i = 1; i < num_lanes; ++i) {
        greatest = lanes[i] > greatest ? lanes[i] : greatest;
    }
    return greatest;
}

// exp(x) times 2^24 for x <= 0, to about one unit in the last place. So all that float32 has, down
// to its least, are normal numbers here: among tokens that hardly anybody looks at, too, the least
// is evicted, and processors take a hundred times as long over numbers that are not normal.
inline Lanes enlarged_exp(Lanes x) {
    Lanes const e = scaled_exp<24>(x < -104.0F ? all(-104.0F) : x);
    return x < -104.0F ? all(0) : e;
}

// Of one query: where its keys, values and weights are. size: the head's width where it is known
// when this is compiled, so that the query and the sums stay in registers.
template <class Rows, int size>
class Attention {
public:
    using Item = typename Rows::Item;

    // scratch: weights and the numbers of heavy slots, each as many as slots and a register more.
    Attention(Slots const& slots, int head_dim, int count, float* scratch)
        : slots_(slots),
          width_(size > 0 ? size : head_dim),
          count_(count),
          weights_(scratch),
          heavy_(reinterpret_cast<int32_t*>(scratch + slots.num_slots + most_lanes)) {}

    void attend(float const* query, float* out) {
        float const total = weigh(query);
        float const factor = 1 / total;
        if (slots_.score != nullptr) {
            add_to_scores(total, factor);
        }
        add_values(find_heavy(total * negligible), factor, out);
    }

private:
    // weights = exp(logit - the greatest) of every slot, 0 of an empty one; their sum.
    float weigh(float const* query) {
        Lanes greatest = all(masked);
        Lanes parts[num_parts];
        if constexpr (size > 0) {
            for (int part = 0; part < num_parts; ++part) {
                parts[part] = load(query + part * num_lanes);
            }
        }
        for (int first = 0; first < count_; first += num_lanes) {
            Lanes logits = logits_of(first, query, parts);
            IntLanes position = IntLanes{} - 1;
            int const left = count_ - first;
            load_first(slots_.position + first, left, position);
            if constexpr (Rows::has_scales) {
                Lanes scales{};
                load_first(slots_.key_scale + first, left, scales);
                logits = logits * (scales * Rows::unit);
            }
            logits = position < 0 ? all(masked) : logits;
            greatest = logits > greatest ? logits : greatest;
            store(logits, weights_ + first);
        }
        Lanes const most = all(greatest_of(greatest));
        Lanes total{};
        for (int first = 0; first < count_; first += num_lanes) {
            Lanes const weight = enlarged_exp(load(weights_ + first) - most);
            store(weight, weights_ + first);
            total += weight;
        }
        return sum_of(total);
    }

    // query times the keys of a register's slots from first on; those beyond the last are any.
    Lanes logits_of(int first, float const* query, Lanes const* parts) const {
        Lanes sums[num_lanes];
        int const last = count_ - 1;
        for (int i = 0; i < num_lanes; ++i) {
            Item const* const key = row(slots_.key, first + i < last ? first + i : last);
            fetch_later(key);
            sums[i] = Lanes{};
            if constexpr (size > 0) {
                for (int part = 0; part < num_parts; ++part) {
                    sums[i] += Rows::load(key + part * num_lanes) * parts[part];
                }
            } else {
                for (int at = 0; at < width_; at += num_lanes) {
                    sums[i] += part_of(key, at) * part_of(query, at);
                }
            }
        }
        return sums_across(sums);
    }

    // Adds each slot's share. Where it is no normal number and the score is too large to feel it,
    // it is left out, since only slow arithmetic would make it.
    void add_to_scores(float total, float factor) const {
        float const slow = total * least_normal;
        for (int first = 0; first < count_; first += num_lanes) {
            Lanes const weight = load(weights_ + first);
            int const left = count_ - first;
            Lanes score{};
            load_first(slots_.score + first, left, score);
            IntLanes const skipped = (weight < slow) & (score >= unmoved);
            score += (skipped ? all(0) : weight) * factor;
            store_first(score, left, slots_.score + first);
        }
    }

    // The slots whose values count, in their order. NaN counts.
    int find_heavy(float least) const {
        int found = 0;
        for (int first = 0; first < count_; first += num_lanes) {
            found += write_places_not_below(load(weights_ + first), least, first, heavy_ + found);
        }
        while (found > 0 && heavy_[found - 1] >= count_) {
            --found;
        }
        return found;
    }

    // out = the sum of weight times value, times the factor.
    void add_values(int num_heavy, float factor, float* out) const {
        factor *= Rows::unit;
        if constexpr (size > 0) {
            Lanes sums[2 * num_parts] = {};  // two rows at a time, so that none waits for another
            for (int place = 0; place < num_heavy; ++place) {
                if (place + ahead < num_heavy) {
                    fetch(row(slots_.value, heavy_[place + ahead]));
                }
                Lanes const weight = all(weight_of(heavy_[place]));
                Item const* const value = row(slots_.value, heavy_[place]);
                Lanes* const own = sums + (place & 1) * num_parts;
                for (int part = 0; part < num_parts; ++part) {
                    own[part] += weight * Rows::load(value + part * num_lanes);
                }
            }
            for (int part = 0; part < num_parts; ++part) {
                store((sums[part] + sums[num_parts + part]) * factor, out + part * num_lanes);
            }
        } else {
            for (int at = 0; at < width_; at += num_lanes) {
                Lanes sum{};
                for (int place = 0; place < num_heavy; ++place) {
                    sum += weight_of(heavy_[place]) * part_of(row(slots_.value, heavy_[place]), at);
                }
                store_first(sum * factor, width_ - at, out + at);
            }
        }
    }

    float weight_of(int slot) const {
        if constexpr (Rows::has_scales) {
            return weights_[slot] * slots_.value_scale[slot];
        }
        return weights_[slot];
    }

    Item const* row(void const* rows, int slot) const {
        return static_cast<Item const*>(rows) + static_cast<int64_t>(slot) * width_;
    }

    // Begins to fetch a row: memory is the slower part, and it comes as it is asked for.
    void fetch(Item const* row) const {
        for (int at = 0; at < width_; at += 64 / static_cast<int>(sizeof(Item))) {
            __builtin_prefetch(row + at);
        }
    }

    // Begins to fetch the same row of the next head, which follows.
    void fetch_later(Item const* key) const {
        Item const* const next = key + static_cast<int64_t>(slots_.num_slots) * width_;
        for (int at = 0; at < width_; at += 64 / static_cast<int>(sizeof(Item))) {
            __builtin_prefetch(next + at, 0, 2);
        }
    }

    // A register of a row from a place on, 0 beyond its end.
    template <class Number>
    Lanes part_of(Number const* row, int at) const {
        Number part[num_lanes] = {};
        int const left = width_ - at;
        for (int i = 0; i < num_lanes && i < left; ++i) {
            part[i] = row[at + i];
        }
        if constexpr (sizeof(Number) == sizeof(float)) {
            return ssd_operators::load(part);
        } else {
            return Rows::load(part);
        }
    }

    static constexpr int num_parts = size > 0 ? size / num_lanes : 1;
    Slots const& slots_;
    int const width_, count_;
    float* const weights_;
    int32_t* const heavy_;
};

template <class Rows, int size>
void attend_queries(Slots const& slots, float const* queries, int num_queries, int head_dim,
                    float* scratch, float* out) {
    int count = slots.num_slots;
    while (count > 1 && slots.position[count - 1] < 0) {
        --count;
    }
    Attention<Rows, size> attention(slots, head_dim, count, scratch);
    for (int query = 0; query < num_queries; ++query) {
        attention.attend(queries + query * head_dim, out + query * head_dim);
    }
}

template <class Rows>
void attend_rows(Slots const& slots, float const* queries, int num_queries, int head_dim,
                 float* scratch, float* out) {
    auto* const of_width = head_dim == 32    ? attend_queries<Rows, 32>
                           : head_dim == 64  ? attend_queries<Rows, 64>
                           : head_dim == 128 ? attend_queries<Rows, 128>
                                             : attend_queries<Rows, 0>;
    of_width(slots, queries, num_queries, head_dim, scratch, out);
}

}  // namespace

namespace SSD_SET {

void attend(Slots const& slots, float const* queries, int num_queries, int head_dim, float* scratch,
            float* out) {
    auto* const of_rows = slots.rows == CacheRows::float16 ? attend_rows<Float16Rows>
                          : slots.rows == CacheRows::int8  ? attend_rows<Int8Rows>
                                                           : attend_rows<Float32Rows>;
    of_rows(slots, queries, num_queries, head_dim, scratch, out);
}

void write_row(CacheRows rows, float const* row, int head_dim, void* to, float* scale) {
    switch (rows) {
    case CacheRows::float32: return Float32Rows::write(row, head_dim, static_cast<float*>(to));
    case CacheRows::float16: return Float16Rows::write(row, head_dim, static_cast<uint16_t*>(to));
    case CacheRows::int8: return Int8Rows::write(row, head_dim, static_cast<int8_t*>(to), scale);
    }
}

void turn(float const* in, Angles const& angles, int half, float factor, float* out) {
#pragma omp simd
    for (int i = 0; i < half; ++i) {
        float const first = in[i] * angles.cos[i] - in[half + i] * angles.sin[i];
        float const second = in[half + i] * angles.cos[i] + in[i] * angles.sin[i];
        out[i] = first * factor;
        out[half + i] = second * factor;
    }
}

template <class Number>
int place_of_least(Number const* numbers, int count) {
    Number least = numbers[0];
#pragma omp simd reduction(min : least)
    for (int i = 0; i < count; ++i) {
        least = numbers[i] < least ? numbers[i] : least;
    }
    int place = 0;
    while (place < count && numbers[place] != least) {
        ++place;
    }
    return place < count ? place : 0;  // none where they are no numbers
}

int lowest(int32_t const* numbers, int count) { return place_of_least(numbers, count); }
int least(float const* numbers, int count) { return place_of_least(numbers, count); }

void gated_silu(float const* gate_up, int64_t size, float* out) {
    for (int64_t first = 0; first < size; first += num_lanes) {
        int const left = static_cast<int>(size - first < num_lanes ? size - first : num_lanes);
        Lanes gate{}, up{};
        load_first(gate_up + first, left, gate);
        load_first(gate_up + size + first, left, up);
        store_first(silu(gate) * up, left, out + first);
    }
}

}  // namespace SSD_SET
}  // namespace ssd_operators
