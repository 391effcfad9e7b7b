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
    if (fields.by_score[group] != 0) {
        sizes.kept_slots = std::max(sizes.kept_slots, static_cast<int32_t>(slots));
    }
}

// Sets the places and the query heads of a KV head from the queries, keys and values of all groups.
void add_heads(bool has_places, Dims const& heads, LayerSizes& sizes) {
    int64_t const num_heads = sizes.num_heads;
    bool const fits = heads.nbDims == (has_places ? 4 : 3);
    int64_t const query_heads = fits ? heads.d[1] - 2 * num_heads : 0;
    if (query_heads < num_heads || query_heads % num_heads != 0) {
        reject("heads has shape " + text_of(heads) +
               ": no whole number of query heads for each of " + std::to_string(num_heads) +
               " KV heads; export the bundle again");
    }
    sizes.query_group_size = static_cast<int32_t>(query_heads / num_heads);
    sizes.num_places = has_places ? static_cast<int32_t>(heads.d[2]) : 1;
}

// Checks a tensor that stands before the caches.
void check_token(TensorForm form, Dims const& given, std::string const& name, int64_t dim,
                 LayerSizes const& sizes, bool has_places) {
    int64_t const rows = sizes.rows, places = sizes.num_places;
    int64_t const query_heads = sizes.num_heads * sizes.query_group_size;
    int64_t const heads = query_heads + 2 * sizes.num_heads;
    switch (form) {
    case TensorForm::kHeads:
        if (has_places) {
            check_dims(given, {rows, heads, places, dim}, name);
        } else {
            check_dims(given, {rows, heads, dim}, name);
        }
        return;
    case TensorForm::kOfRows: check_dims(given, {rows}, name); return;
    case TensorForm::kLogits:
        check_dims(given, {rows, query_heads, places, places < 0 ? -1 : sizes.kept_slots + places},
                   name);
        return;
    case TensorForm::kOfQuery: check_dims(given, {rows, query_heads, places}, name); return;
    case TensorForm::kOut: return;  // no input is one
    }
}

DataType token_type(TensorForm form, DataType data_type) {
    switch (form) {
    case TensorForm::kOfRows: return DataType::kINT32;
    case TensorForm::kLogits:
    case TensorForm::kOfQuery: return DataType::kFLOAT;
    default: return data_type;
    }
}

DataType cache_type(CachePart part, DataType data_type) {
    switch (part) {
    case kPastPosition: return DataType::kINT32;
    case kPastScore: return DataType::kFLOAT;
    default: return data_type;
    }
}

}  // namespace

NodeTensors::NodeTensors(NodeKind const& kind, AttentionFields const& fields) : kind_(kind) {
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
            return first_cache() + static_cast<int32_t>(place);
        }
    }
    return -1;
}

DataType NodeTensors::type_of(int32_t place, DataType data_type) const {
    if (place >= num_inputs()) {
        int32_t const output = place - num_inputs(), alias = aliased_input(output);
        if (alias < 0) {
            return token_type(kind_.outputs[output].form, data_type);
        }
        place = alias;
    }
    if (place < first_cache()) {
        return token_type(kind_.inputs[place].form, data_type);
    }
    return cache_type(caches_[place - first_cache()].part, data_type);
}

std::string NodeTensors::name_of(int32_t input) const {
    if (input < first_cache()) {
        return kind_.inputs[input].name;
    }
    CacheInput const& cache = caches_[input - first_cache()];
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
    NodeKind const& kind = tensors.kind();
    int64_t const rows = sizes.rows = dims_of(tensors.first_cache()).d[0];
    add_heads(kind.has_places, dims_of(kHeads), sizes);
    for (int32_t input = 0; input < tensors.first_cache(); ++input) {
        check_token(kind.inputs[input].form, dims_of(input), tensors.name_of(input),
                    fields.kernel_head_dim, sizes, kind.has_places);
    }
    for (int32_t input = tensors.first_cache(); input < tensors.num_inputs(); ++input) {
        CacheInput const& cache = tensors.caches()[input - tensors.first_cache()];
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
