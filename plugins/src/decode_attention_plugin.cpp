#include "ssd_export/decode_attention_plugin.h"

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "ssd_export/messages.h"

namespace ssd_export {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

// Places of the inputs; present_key to present_score are outputs 1 to 4, in the order of past_key
// to past_score.
enum Input {
    kQuery,
    kKey,
    kValue,
    kPosition,
    kPromptLength,
    kPastKey,
    kPastValue,
    kPastPosition,
    kPastScore
};
constexpr int32_t kNumCaches = 3;  // beside the score
constexpr int32_t kAlignment = 16;

char const* const kInputNames[] = {"query",      "key",           "value",
                                   "position",   "prompt_length", "past_key",
                                   "past_value", "past_position", "past_score"};

int32_t aliased_input(int32_t output) { return output == 0 ? -1 : kPastKey + output - 1; }

// The dtype of input or output `place`, inputs first.
DataType type_of(int32_t place, int32_t num_inputs, DataType data_type) {
    if (place >= num_inputs) {
        int32_t const alias = aliased_input(place - num_inputs);
        place = alias < 0 ? kQuery : alias;
    }
    switch (place) {
    case kPosition:
    case kPromptLength:
    case kPastPosition: return DataType::kINT32;
    case kPastScore: return DataType::kFLOAT;
    default: return data_type;
    }
}

std::string text_of(Dims const& dims) {
    std::string text;
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        text += (i == 0 ? "" : " x ") + std::to_string(dims.d[i]);
    }
    return "[" + text + "]";
}

// Rows, KV heads, slots and query heads per KV head of a launch.
struct Sizes {
    int64_t rows;
    int32_t num_heads;
    int32_t num_slots;
    int32_t query_group_size;
};

void check_dims(Dims const& given, std::initializer_list<int64_t> wanted, int32_t input) {
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
        throw std::invalid_argument(
            std::string(kInputNames[input]) + " has shape " + text_of(given) + " where " +
            text_of(dims) + " was expected; the ONNX file is damaged, export the bundle again");
    }
}

// The sizes in the input shapes, where dimensions that are not yet known are -1. Throws
// std::invalid_argument.
template <typename DimsOf>
Sizes sizes_of(AttentionFields const& fields, DimsOf dims_of) {
    Dims const& cache = dims_of(kPastKey);
    if (cache.nbDims != 4) {
        throw std::invalid_argument(
            "past_key has shape " + text_of(cache) + " where [rows x heads x slots x " +
            std::to_string(fields.kernel_head_dim) + "] was expected; export the bundle again");
    }
    int64_t const rows = cache.d[0], heads = cache.d[1], slots = cache.d[2],
                  dim = fields.kernel_head_dim;
    if (cache.d[3] != dim) {
        throw std::invalid_argument("the kernel is for head_dim " + std::to_string(dim) +
                                    ", the model has " + std::to_string(cache.d[3]) +
                                    "; compile the kernels with --head-dims " +
                                    std::to_string(cache.d[3]));
    }
    if (heads < 1 || slots < 1 || slots > fields.kernel_max_slots) {
        throw std::invalid_argument("past_key has " + std::to_string(slots) +
                                    " slots; the kernel holds 1 to " +
                                    std::to_string(fields.kernel_max_slots) +
                                    ", compile the kernels with a larger "
                                    "--max-slots");
    }
    if (fields.evict_every > slots) {
        throw std::invalid_argument("evict_every=" + std::to_string(fields.evict_every) +
                                    " evicts more than the " + std::to_string(slots) +
                                    " slots there are; use evict_every <= num_slots");
    }
    Dims const& query = dims_of(kQuery);
    int64_t const query_heads = query.nbDims == 3 ? query.d[1] : 0;
    if (query_heads < heads || query_heads % heads != 0) {
        throw std::invalid_argument("query has shape " + text_of(query) +
                                    ": no whole number of query heads for each of " +
                                    std::to_string(heads) + " KV heads; export the bundle again");
    }
    check_dims(query, {rows, query_heads, dim}, kQuery);
    check_dims(dims_of(kKey), {rows, heads, dim}, kKey);
    check_dims(dims_of(kValue), {rows, heads, dim}, kValue);
    check_dims(dims_of(kPosition), {rows}, kPosition);
    check_dims(dims_of(kPromptLength), {rows}, kPromptLength);
    check_dims(dims_of(kPastValue), {rows, heads, slots, dim}, kPastValue);
    check_dims(dims_of(kPastPosition), {rows, heads, slots}, kPastPosition);
    if (fields.by_score != 0) {
        check_dims(dims_of(kPastScore), {rows, heads, slots}, kPastScore);
    }
    return {rows, static_cast<int32_t>(heads), static_cast<int32_t>(slots),
            static_cast<int32_t>(query_heads / heads)};
}

// What a launch keeps between attending and adding to the scores: a float for every slot.
size_t logits_bytes(AttentionFields const& fields, Sizes const& sizes) {
    return fields.by_score == 0 ? 0
                                : static_cast<size_t>(sizes.rows) * sizes.num_heads *
                                      sizes.num_slots * sizeof(float);
}

void check_num_inputs(int32_t given, int32_t wanted) {
    if (given != wanted) {
        throw std::invalid_argument(
            "the node has " + std::to_string(given) + " inputs where " + std::to_string(wanted) +
            " were expected (past_score goes with by_score=1); export the bundle again");
    }
}

void check_pointers(void const* const* inputs, void* const* outputs, int32_t num_inputs,
                    int32_t num_outputs) {
    for (int32_t output = 1; output < num_outputs; ++output) {
        if (outputs[output] != inputs[aliased_input(output)]) {
            throw std::runtime_error(
                std::string(kInputNames[aliased_input(output)]) +
                " and its output have different "
                "buffers; build with PreviewFeature.ALIASED_PLUGIN_IO_10_03 and bind one buffer to "
                "both");
        }
    }
    for (int32_t input = 0; input < num_inputs; ++input) {
        bool const is_loaded_in_blocks = input != kPosition && input != kPromptLength;
        if (is_loaded_in_blocks && reinterpret_cast<uintptr_t>(inputs[input]) % kAlignment != 0) {
            throw std::runtime_error(std::string(kInputNames[input]) +
                                     " is not aligned to 16 bytes; bind buffers as "
                                     "cudaMalloc returns them");
        }
    }
}

// Runs work and returns its success as TensorRT wants it: 0, or -1 after a message.
template <typename Work>
int32_t reported(Work work) noexcept {
    try {
        work();
        return 0;
    } catch (std::exception const& error) {
        report_error(error.what());
        return -1;
    }
}

}  // namespace

nvinfer1::IPluginCapability* DecodeAttentionPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* DecodeAttentionPlugin::clone() noexcept {
    DecodeAttentionPlugin* copy = nullptr;
    reported([&] {
        copy = new DecodeAttentionPlugin(fields_);
        copy->kernel_ = kernel_;
    });
    return copy;
}

int32_t DecodeAttentionPlugin::getNbOutputs() const noexcept {
    return 1 + kNumCaches + fields_.by_score;
}

int32_t DecodeAttentionPlugin::getAliasedInput(int32_t output) noexcept {
    return aliased_input(output);
}

int32_t DecodeAttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t num_outputs,
                                                  DataType const* inputs,
                                                  int32_t num_inputs) const noexcept {
    return reported([&] {
        check_num_inputs(num_inputs, this->num_inputs());
        for (int32_t output = 0; output < num_outputs; ++output) {
            outputs[output] = type_of(num_inputs + output, num_inputs, fields_.data_type());
        }
    });
}

int32_t DecodeAttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs,
                                               int32_t num_inputs,
                                               nvinfer1::DimsExprs const* shapes,
                                               int32_t num_shapes, nvinfer1::DimsExprs* outputs,
                                               int32_t num_outputs,
                                               nvinfer1::IExprBuilder& builder) noexcept {
    return reported([&] {
        check_num_inputs(num_inputs, this->num_inputs());
        outputs[0] = inputs[kQuery];
        for (int32_t output = 1; output < num_outputs; ++output) {
            outputs[output] = inputs[aliased_input(output)];
        }
    });
}

bool DecodeAttentionPlugin::supportsFormatCombination(
    int32_t place, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t num_inputs,
    int32_t num_outputs) noexcept {
    nvinfer1::PluginTensorDesc const& tensor = tensors[place].desc;
    bool fits = false;
    reported([&] {
        check_num_inputs(num_inputs, this->num_inputs());
        fits = tensor.format == nvinfer1::TensorFormat::kLINEAR &&
               tensor.type == type_of(place, num_inputs, fields_.data_type());
    });
    return fits;
}

int32_t DecodeAttentionPlugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs,
                                               int32_t num_inputs,
                                               nvinfer1::DynamicPluginTensorDesc const* outputs,
                                               int32_t num_outputs) noexcept {
    return reported([&] {
        check_num_inputs(num_inputs, this->num_inputs());
        sizes_of(fields_, [&](int32_t input) -> Dims const& { return inputs[input].desc.dims; });
    });
}

size_t DecodeAttentionPlugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs,
                                               int32_t num_inputs,
                                               nvinfer1::DynamicPluginTensorDesc const* outputs,
                                               int32_t num_outputs) const noexcept {
    size_t num_bytes = 0;
    reported([&] {
        check_num_inputs(num_inputs, this->num_inputs());
        Sizes const most =
            sizes_of(fields_, [&](int32_t input) -> Dims const& { return inputs[input].max; });
        num_bytes = logits_bytes(fields_, most);
    });
    return num_bytes;
}

int32_t DecodeAttentionPlugin::onShapeChange(nvinfer1::PluginTensorDesc const* inputs,
                                             int32_t num_inputs,
                                             nvinfer1::PluginTensorDesc const* outputs,
                                             int32_t num_outputs) noexcept {
    return reported([&] {
        check_num_inputs(num_inputs, this->num_inputs());
        sizes_of(fields_, [&](int32_t input) -> Dims const& { return inputs[input].dims; });
        if (kernel_ == nullptr) {
            kernel_ = Kernel::load(fields_);
        }
    });
}

int32_t DecodeAttentionPlugin::enqueue(nvinfer1::PluginTensorDesc const* input_descs,
                                       nvinfer1::PluginTensorDesc const* output_descs,
                                       void const* const* inputs, void* const* outputs,
                                       void* workspace, cudaStream_t stream) noexcept {
    return reported([&] {
        Sizes const sizes = sizes_of(
            fields_, [&](int32_t input) -> Dims const& { return input_descs[input].dims; });
        check_pointers(inputs, outputs, num_inputs(), getNbOutputs());
        if (kernel_ == nullptr) {
            kernel_ = Kernel::load(fields_);
        }
        void const* score = fields_.by_score != 0 ? inputs[kPastScore] : nullptr;
        if (fields_.by_score != 0 && workspace == nullptr) {
            throw std::runtime_error("TensorRT gave no workspace for the logits");
        }
        // compiled Triton kernels end with two scratch pointers; this one needs none
        void* scratch = nullptr;
        int32_t token_stride = sizes.num_heads * fields_.kernel_head_dim;
        int32_t query_stride = token_stride * sizes.query_group_size;
        // In the order of kernels.json.
        void const* arguments[] = {
            &inputs[kQuery],
            &inputs[kKey],
            &inputs[kValue],
            &inputs[kPosition],
            &inputs[kPromptLength],
            &inputs[kPastKey],
            &inputs[kPastValue],
            &inputs[kPastPosition],
            &score,
            &workspace,
            &outputs[0],
            &query_stride,
            &token_stride,
            &token_stride,
            &sizes.num_heads,
            &sizes.query_group_size,
            &sizes.num_slots,
            &fields_.num_sinks,
            &fields_.num_recent,
            &fields_.by_score,
            &fields_.pinned_columns,
            &fields_.grid_width,
            &fields_.age_quota,
            &fields_.evict_every,
            &fields_.score_decay,
            &scratch,
            &scratch,
        };
        kernel_->launch(sizes.rows * sizes.num_heads, fields_, arguments, stream);
    });
}

nvinfer1::IPluginV3* DecodeAttentionPlugin::attachToContext(
    nvinfer1::IPluginResourceContext* context) noexcept {
    return clone();
}

nvinfer1::PluginFieldCollection const* DecodeAttentionPlugin::getFieldsToSerialize() noexcept {
    int32_t const result = reported([&] {
        serialized_ = fields_to_serialize(fields_);
        collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    });
    return result == 0 ? &collection_ : nullptr;
}

}  // namespace ssd_export
