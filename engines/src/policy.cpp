#include "policy.h"

#include <algorithm>
#include <bitset>

#include "failure.h"

namespace ssd_runtime {
namespace {

constexpr uint64_t position_bytes = 4, score_bytes = 4, row_scale_bytes = 4;

void check_group(PolicyTable const& table, HeadGroup const& group, size_t layer, bool can_fill) {
    Rule const& rule = group.rule;
    std::string const where = text("layer ", layer, ": ");
    if (rule.num_sinks < -1 || rule.num_recent < 0 ||
        (table.grid.width < 64 && (rule.pinned_columns >> table.grid.width) != 0)) {
        fail(
            SSD_BAD_BUNDLE, where, "Rule(num_sinks=", rule.num_sinks,
            ", num_recent=", rule.num_recent, ", by_score=", rule.by_score ? "True" : "False",
            ", pinned_columns=", rule.pinned_columns,
            ") is out of range; use num_sinks >= -1, num_recent >= 0 and a pinned_columns mask of ",
            table.grid.width, " bits");
    }
    if (group.num_heads < 1 || group.evict_every < 1) {
        fail(SSD_BAD_BUNDLE, where, "num_heads=", group.num_heads,
             " and evict_every=", group.evict_every, " must be at least 1; leave empty groups out");
    }
    if (!can_fill) {
        return;
    }
    int64_t const image_slots = group.num_slots - table.prompt_slots;
    if (image_slots < 1) {
        fail(SSD_BAD_BUNDLE, where, group.num_slots, " slots leave none for image tokens beside ",
             table.prompt_slots, " prompt slots; use a larger budget");
    }
    int64_t const sinks = rule.num_sinks < 0 ? table.prompt_slots : rule.num_sinks;
    int64_t const recent = std::max<int64_t>(rule.num_recent - 1, 0);
    auto const columns = static_cast<int64_t>(std::bitset<64>(rule.pinned_columns).count());
    int64_t const num_protected = sinks + recent + table.grid.height * columns;
    int64_t const least = num_protected + group.evict_every;
    if (group.num_slots < least) {
        fail(SSD_BAD_BUNDLE, where,
             rule.num_sinks < 0 ? "the prompt" : text(rule.num_sinks, " sinks"), " + ", recent,
             " recent + ", columns, " pinned columns protect ", num_protected, " of ",
             group.num_slots, " slots, and evict_every=", group.evict_every,
             " must fit beside them; use image slots >= ", least - table.prompt_slots, " (now ",
             image_slots,
             "; a larger budget gives more), a smaller num_recent or a smaller evict_every");
    }
}

}  // namespace

void PolicyTable::validate() const {
    if (!(score_decay >= 0 && score_decay <= 1)) {
        fail(SSD_BAD_BUNDLE, "score_decay=", score_decay,
             " is outside [0, 1]; use 1 for the running sum, 0 for what came since the last "
             "eviction");
    }
    if (prompt_slots < 1) {
        fail(SSD_BAD_BUNDLE, "prompt_slots=", prompt_slots, " holds no prompt; use 64");
    }
    for (size_t layer = 0; layer < layers.size(); ++layer) {
        for (HeadGroup const& group : layers[layer]) {
            check_group(*this, group, layer, can_fill(group));
        }
    }
}

bool PolicyTable::can_fill(HeadGroup const& group) const {
    return group.num_slots < prompt_slots + grid.num_tokens();
}

std::set<EvictionKind> PolicyTable::eviction_kinds() const {
    std::set<EvictionKind> kinds;
    for (auto const& groups : layers) {
        for (HeadGroup const& group : groups) {
            if (group.evict_every > 1 && can_fill(group)) {
                kinds.emplace(group.num_slots, group.evict_every);
            }
        }
    }
    return kinds;
}

std::set<int64_t> PolicyTable::full_before(EvictionKind kind,
                                           std::vector<int32_t> const& lengths) const {
    auto const [num_slots, evict_every] = kind;
    std::set<int64_t> steps;
    for (int32_t const length : lengths) {
        for (int64_t step = num_slots - length + 1; step < grid.num_tokens(); step += evict_every) {
            steps.insert(step);
        }
    }
    return steps;
}

std::vector<int64_t> PolicyTable::rooms(std::vector<int32_t> const& lengths) const {
    std::set<EvictionKind> kinds;
    for (auto const& groups : layers) {
        for (HeadGroup const& group : groups) {
            if (can_fill(group)) {
                kinds.emplace(group.num_slots, group.evict_every);
            }
        }
    }
    std::set<int64_t> full;
    for (EvictionKind const& kind : kinds) {
        full.merge(full_before(kind, lengths));
    }
    std::vector<int64_t> found(static_cast<size_t>(grid.num_tokens()));
    int64_t room = 0;
    for (int64_t step = grid.num_tokens() - 1; step >= 0; --step) {
        found[static_cast<size_t>(step)] = ++room;
        room = full.count(step) > 0 ? 0 : room;
    }
    return found;
}

uint64_t PolicyTable::tokens_evicted(int64_t length) const {
    int64_t evicted = 0;
    for (auto const& groups : layers) {
        for (HeadGroup const& group : groups) {
            // The last token is only sampled, never written.
            int64_t const overflow = length + grid.num_tokens() - 1 - group.num_slots;
            if (overflow > 0) {
                int64_t const evictions = (overflow + group.evict_every - 1) / group.evict_every;
                evicted += group.num_heads * evictions * group.evict_every;
            }
        }
    }
    return static_cast<uint64_t>(evicted);
}

uint64_t PolicyTable::slot_bytes(Rule const& rule, int64_t head_dim, size_t item_bytes) const {
    auto const width = static_cast<uint64_t>(head_dim);
    uint64_t const row = int8_cache ? width + row_scale_bytes : width * item_bytes;
    return 2 * row + position_bytes + (rule.by_score ? score_bytes : 0);
}

uint64_t PolicyTable::cache_bytes(int64_t head_dim, size_t item_bytes, int64_t rows) const {
    uint64_t sum = 0;
    for (auto const& groups : layers) {
        for (HeadGroup const& group : groups) {
            sum += static_cast<uint64_t>(rows * group.num_heads * group.num_slots) *
                   slot_bytes(group.rule, head_dim, item_bytes);
        }
    }
    return sum;
}

uint64_t PolicyTable::image_cache_bytes(int64_t head_dim, size_t item_bytes, int64_t rows) const {
    uint64_t sum = 0;
    for (auto const& groups : layers) {
        for (HeadGroup const& group : groups) {
            sum +=
                static_cast<uint64_t>(rows * group.num_heads * (group.num_slots - prompt_slots)) *
                slot_bytes(group.rule, head_dim, item_bytes);
        }
    }
    return sum;
}

uint64_t PolicyTable::full_cache_bytes(int64_t head_dim, size_t item_bytes, int64_t rows,
                                       int64_t num_tokens) const {
    uint64_t heads = 0;
    for (auto const& groups : layers) {
        for (HeadGroup const& group : groups) {
            heads += static_cast<uint64_t>(group.num_heads);
        }
    }
    return heads * static_cast<uint64_t>(rows * num_tokens * head_dim) * 2 * item_bytes;
}

std::string eviction_graph(EvictionKind kind) {
    return text("evict_", kind.first, "_slots_", kind.second, "_at_once");
}

}  // namespace ssd_runtime
