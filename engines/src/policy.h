#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "grid.h"

namespace ssd_runtime {

// What R3 protects and ranks by (ssd_export/policy/table.py has the rules and their numbers).
struct Rule {
    int64_t num_sinks, num_recent;
    bool by_score;
    uint64_t pinned_columns;
    bool age_quota;
};

// Neighboring KV heads of a layer with one rule and one tensor; num_slots includes the prompt's.
struct HeadGroup {
    Rule rule;
    int64_t num_slots, evict_every, num_heads;
};

// (num_slots, evict_every): groups that agree in both evict before the same steps.
using EvictionKind = std::pair<int64_t, int64_t>;

// The policy table of a bundle, validated (R9).
struct PolicyTable {
    std::string name;
    double budget, score_decay;
    int64_t prompt_slots;
    bool int8_cache;
    Grid grid;
    std::vector<std::vector<HeadGroup>> layers;

    // Throws Failure SSD_BAD_BUNDLE where a group does not obey R9.
    void validate() const;

    // The kinds of the groups that evict several tokens at a time, and so between steps.
    std::set<EvictionKind> eviction_kinds() const;

    // Steps before which heads of that kind are full, in a row with a prompt of one of these
    // lengths.
    std::set<int64_t> full_before(EvictionKind kind, std::vector<int32_t> const& lengths) const;

    // Steps that the caches take from each step of an image on before the next eviction, without
    // one that is due before that very step. lengths: of the prompts in the rows of the image.
    std::vector<int64_t> rooms(std::vector<int32_t> const& lengths) const;

    // (layer, KV head, token) triples that a row with a prompt of this length drops.
    uint64_t tokens_evicted(int64_t length) const;

    // Bytes of keys, values (and their scales), positions and scores of so many rows.
    uint64_t cache_bytes(int64_t head_dim, size_t item_bytes, int64_t rows) const;
    // The same of the image slots alone.
    uint64_t image_cache_bytes(int64_t head_dim, size_t item_bytes, int64_t rows) const;
    // Whether an image can take every slot of a group, so that evictions happen at all.
    bool can_fill(HeadGroup const& group) const;
    // Keys and values of a cache that keeps so many tokens of every head.
    uint64_t full_cache_bytes(int64_t head_dim, size_t item_bytes, int64_t rows,
                              int64_t num_tokens) const;

private:
    uint64_t slot_bytes(Rule const& rule, int64_t head_dim, size_t item_bytes) const;
};

// The name of the graph that evicts in the groups of one kind.
std::string eviction_graph(EvictionKind kind);

}  // namespace ssd_runtime
