#include "ssd_export/layer_shapes.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

namespace ssd_export {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

char const* const kPartNames[] = {"past_key", "past_value", "past_position", "past_score"};

[[noreturn]] void reject(std::string const& message) { throw std::invalid_argument(message); }

std::string text_of(Dims const& dims) {
    std::string text;
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        text += (i == 0 ? "" : " x ") + std::to_string(dims.d[i]);
    }
    return "[" + text + "]";
}

void check_dims(Dims const& given, std::initializer_list<int64_t> wanted, std::string const& name) {
    bool fits = given.nbDims == static_cast<int32_t>(wanted.size());
    int32_t place = 0;
    for (int64_t size : wanted) {
        fits =
            fits && (given.d[place] == size || size < 0 || given.d[place] < 0);  // -1: known later
        ++place;
    }
    if (!fits) {
        Dims dims{};
        for (int64_t size : wanted) {
            dims.d[dims.nbDims++] = size;
        }
        reject(name + " has shape " + text_of(given) + " where " + text_of(dims) +
               " was expected; the ONNX file is damaged, export the bundle again");
    }
}

// Checks the key cache of a group, whose rows are `rows`, and adds the group to the sizes.
void add_group(AttentionFields const& fields, int32_t group, Dims const& cache,
               std::string const& name, LayerSizes& sizes) {
    int64_t const dim = fields.kernel_head_dim;
    if (cache.nbDims != 4) {
        reject(name + " has shape " + text_of(cache) + " where [rows x heads x slots x " +
               std::to_string(dim) + "] was expected; export the bundle again");
    }
    int64_t const heads = cache.d[1], slots = cache.d[2];
    if (cache.d[3] != dim) {
        reject("the kernel is for head_dim " + std::to_string(dim) + ", the model has " +
               std::to_string(cache.d[3]) + "; compile the kernels with --head-dims " +
               std::to_string(cache.d[3]));
    }
    if (heads < 1 || slots < 1 || slots > fields.kernel_max_slots) {
        reject(name + " has " + std::to_string(slots) + " slots; the kernel holds 1 to " +
               std::to_string(fields.kernel_max_slots) +
               ", compile the kernels with a larger --max-slots");
    }
    if (fields.evict_every[group] > slots) {
        reject("evict_every=" + std::to_string(fields.evict_every[group]) +
               " evicts more than the " + std::to_string(slots) +
               " slots there are; use evict_every <= num_slots");
    }
    sizes.first_heads[group] = sizes.num_heads;
    sizes.group_heads[group] = static_cast<int32_t>(heads);
    sizes.group_slots[group] = static_cast<int32_t>(slots);
    sizes.num_heads += static_cast<int32_t>(heads);
    sizes.most_slots = std::max(sizes.most_slots, static_cast<int32_t>(slots));
}

// Checks the queries, keys and values of all groups and returns the query heads of a KV head.
int32_t query_group_size(AttentionFields const& fields, Dims const& heads,
                         LayerSizes const& sizes) {
    int64_t const dim = fields.kernel_head_dim, num_heads = sizes.num_heads;
    int64_t const query_heads = heads.nbDims == 3 ? heads.d[1] - 2 * num_heads : 0;
    if (query_heads < num_heads || query_heads % num_heads != 0) {
        reject("heads has shape " + text_of(heads) +
               ": no whole number of query heads for each of " + std::to_string(num_heads) +
               " KV heads; export the bundle again");
    }
    check_dims(heads, {sizes.rows, query_heads + 2 * num_heads, dim}, "heads");
    return static_cast<int32_t>(query_heads / num_heads);
}

}  // namespace

NodeTensors::NodeTensors(AttentionFields const& fields) {
    for (int32_t group = 0; group < fields.num_groups; ++group) {
        for (CachePart const part : {kPastKey, kPastValue, kPastPosition, kPastScore}) {
            if (part != kPastScore || fields.by_score[group] != 0) {
                caches_.push_back({group, part});
            }
        }
    }
}

int32_t NodeTensors::input_of(int32_t group, CachePart part) const {
    for (size_t place = 0; place < caches_.size(); ++place) {
        if (caches_[place].group == group && caches_[place].part == part) {
            return kFirstCache + static_cast<int32_t>(place);
        }
    }
    return -1;
}

DataType NodeTensors::type_of(int32_t place, DataType data_type) const {
    if (place >= num_inputs()) {
        int32_t const alias = aliased_input(place - num_inputs());
        place = alias < 0 ? kHeads : alias;
    }
    if (place == kPosition || place == kPromptLength) {
        return DataType::kINT32;
    }
    if (place >= kFirstCache && caches_[place - kFirstCache].part == kPastPosition) {
        return DataType::kINT32;
    }
    if (place >= kFirstCache && caches_[place - kFirstCache].part == kPastScore) {
        return DataType::kFLOAT;
    }
    return data_type;
}

std::string NodeTensors::name_of(int32_t input) const {
    if (input < kFirstCache) {
        char const* const names[] = {"heads", "position", "prompt_length"};
        return names[input];
    }
    CacheInput const& cache = caches_[input - kFirstCache];
    return std::string(kPartNames[cache.part]) + " of group " + std::to_string(cache.group);
}

void NodeTensors::check_num_inputs(int32_t given) const {
    if (given != num_inputs()) {
        reject("the node has " + std::to_string(given) + " inputs where " +
               std::to_string(num_inputs()) +
               " were expected (past_score goes with by_score=1); export the bundle again");
    }
}

LayerSizes sizes_of(AttentionFields const& fields, NodeTensors const& tensors,
                    std::function<Dims const&(int32_t input)> const& dims_of) {
    LayerSizes sizes{};
    for (int32_t group = 0; group < fields.num_groups; ++group) {
        int32_t const input = tensors.input_of(group, kPastKey);
        add_group(fields, group, dims_of(input), tensors.name_of(input), sizes);
    }
    for (int32_t group = fields.num_groups; group < kMaxGroups; ++group) {
        sizes.first_heads[group] = sizes.num_heads;  // which no program is in
        sizes.group_heads[group] = sizes.group_slots[group] = 1;
    }
    int64_t const rows = sizes.rows = dims_of(tensors.kFirstCache).d[0];
    sizes.query_group_size = query_group_size(fields, dims_of(tensors.kHeads), sizes);
    check_dims(dims_of(tensors.kPosition), {rows}, "position");
    check_dims(dims_of(tensors.kPromptLength), {rows}, "prompt_length");
    for (int32_t input = tensors.kFirstCache; input < tensors.num_inputs(); ++input) {
        CacheInput const& cache = tensors.caches()[input - tensors.kFirstCache];
        int64_t const heads = sizes.group_heads[cache.group],
                      slots = sizes.group_slots[cache.group];
        if (cache.part == kPastKey || cache.part == kPastValue) {
            check_dims(dims_of(input), {rows, heads, slots, fields.kernel_head_dim},
                       tensors.name_of(input));
        } else {
            check_dims(dims_of(input), {rows, heads, slots}, tensors.name_of(input));
        }
    }
    return sizes;
}

}  // namespace ssd_export
