#include "ssd_export/attention_plugin.h"

#include <stdexcept>
#include <string>

#include "ssd_export/messages.h"

namespace ssd_export {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr uintptr_t kAlignment = 16;  // bytes that the kernels load at once

void check_pointers(NodeTensors const& tensors, void const* const* inputs, void* const* outputs) {
    for (int32_t output = 0; output < tensors.num_outputs(); ++output) {
        int32_t const input = tensors.aliased_input(output);
        if (input >= 0 && outputs[output] != inputs[input]) {
            throw std::runtime_error(tensors.name_of(input) +
                                     " and its output have different buffers; build with "
                                     "PreviewFeature.ALIASED_PLUGIN_IO_10_03 and bind one buffer "
                                     "to both");
        }
    }
    for (int32_t input = tensors.first_cache(); input < tensors.num_inputs(); ++input) {
        if (reinterpret_cast<uintptr_t>(inputs[input]) % kAlignment != 0) {
            throw std::runtime_error(
                tensors.name_of(input) +
                " is not aligned to 16 bytes; bind buffers as cudaMalloc returns them");
        }
    }
}

// Shapes of what a node puts out beside its caches, as expressions of its inputs' shapes.
class Extents {
public:
    Extents(AttentionFields const& fields, NodeTensors const& tensors,
            nvinfer1::DimsExprs const* inputs, nvinfer1::IExprBuilder& builder)
        : out_(inputs[kHeads]) {
        using nvinfer1::DimensionOperation;
        kept_ = builder.constant(0);
        for (int32_t group = 0; group < fields.num_groups; ++group) {
            nvinfer1::DimsExprs const& key = inputs[tensors.input_of(group, kPastKey)];
            nvinfer1::IDimensionExpr const& keys_and_values =
                *builder.operation(DimensionOperation::kPROD, *builder.constant(2), *key.d[1]);
            out_.d[1] = builder.operation(DimensionOperation::kSUB, *out_.d[1], keys_and_values);
            if (fields.by_score[group] != 0) {
                kept_ = builder.operation(DimensionOperation::kMAX, *kept_, *key.d[2]);
            }
        }
        if (tensors.kind().has_places) {
            kept_ = builder.operation(DimensionOperation::kSUM, *kept_, *out_.d[2]);
        }
    }

    nvinfer1::DimsExprs of(TensorForm form) const {
        nvinfer1::DimsExprs dims = out_;
        if (form == TensorForm::kLogits) {
            dims.d[3] = kept_;
        } else if (form == TensorForm::kOfQuery) {
            dims.nbDims = 3;
        }
        return dims;
    }

private:
    nvinfer1::DimsExprs out_;
    nvinfer1::IDimensionExpr const* kept_;
};

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

nvinfer1::IPluginCapability* AttentionPlugin::getCapabilityInterface(
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

nvinfer1::IPluginV3* AttentionPlugin::clone() noexcept {
    AttentionPlugin* copy = nullptr;
    reported([&] {
        copy = new AttentionPlugin(kind_, fields_);
        copy->kernels_ = kernels_;
    });
    return copy;
}

int32_t AttentionPlugin::getNbOutputs() const noexcept { return tensors_.num_outputs(); }

int32_t AttentionPlugin::getAliasedInput(int32_t output) noexcept {
    return tensors_.aliased_input(output);
}

int32_t AttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t num_outputs,
                                            DataType const* inputs,
                                            int32_t num_inputs) const noexcept {
    return reported([&] {
        tensors_.check_num_inputs(num_inputs);
        for (int32_t output = 0; output < num_outputs; ++output) {
            outputs[output] = tensors_.type_of(num_inputs + output, fields_.data_type());
        }
    });
}

int32_t AttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                                         nvinfer1::DimsExprs const* shapes, int32_t num_shapes,
                                         nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                                         nvinfer1::IExprBuilder& builder) noexcept {
    return reported([&] {
        tensors_.check_num_inputs(num_inputs);
        Extents const extents(fields_, tensors_, inputs, builder);
        for (int32_t output = 0; output < num_outputs; ++output) {
            int32_t const alias = tensors_.aliased_input(output);
            outputs[output] = alias < 0 ? extents.of(kind_.outputs[output].form) : inputs[alias];
        }
    });
}

bool AttentionPlugin::supportsFormatCombination(int32_t place,
                                                nvinfer1::DynamicPluginTensorDesc const* tensors,
                                                int32_t num_inputs, int32_t num_outputs) noexcept {
    nvinfer1::PluginTensorDesc const& tensor = tensors[place].desc;
    bool fits = false;
    reported([&] {
        tensors_.check_num_inputs(num_inputs);
        fits = tensor.format == nvinfer1::TensorFormat::kLINEAR &&
               tensor.type == tensors_.type_of(place, fields_.data_type());
    });
    return fits;
}

int32_t AttentionPlugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs,
                                         int32_t num_inputs,
                                         nvinfer1::DynamicPluginTensorDesc const* outputs,
                                         int32_t num_outputs) noexcept {
    return reported([&] {
        tensors_.check_num_inputs(num_inputs);
        sizes_of(fields_, tensors_,
                 [&](int32_t input) -> Dims const& { return inputs[input].desc.dims; });
    });
}

size_t AttentionPlugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs,
                                         int32_t num_inputs,
                                         nvinfer1::DynamicPluginTensorDesc const* outputs,
                                         int32_t num_outputs) const noexcept {
    size_t num_bytes = 0;
    reported([&] {
        tensors_.check_num_inputs(num_inputs);
        num_bytes = kind_.workspace_bytes(
            fields_, sizes_of(fields_, tensors_,
                              [&](int32_t input) -> Dims const& { return inputs[input].max; }));
    });
    return num_bytes;
}

int32_t AttentionPlugin::onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t num_inputs,
                                       nvinfer1::PluginTensorDesc const* outputs,
                                       int32_t num_outputs) noexcept {
    return reported([&] {
        tensors_.check_num_inputs(num_inputs);
        sizes_of(fields_, tensors_,
                 [&](int32_t input) -> Dims const& { return inputs[input].dims; });
        if (kernels_ == nullptr) {
            kernels_ = LayerKernels::load(fields_);
        }
    });
}

int32_t AttentionPlugin::enqueue(nvinfer1::PluginTensorDesc const* input_descs,
                                 nvinfer1::PluginTensorDesc const* output_descs,
                                 void const* const* inputs, void* const* outputs, void* workspace,
                                 cudaStream_t stream) noexcept {
    return reported([&] {
        LayerSizes const sizes = sizes_of(fields_, tensors_, [&](int32_t input) -> Dims const& {
            return input_descs[input].dims;
        });
        check_pointers(tensors_, inputs, outputs);
        if (kernels_ == nullptr) {
            kernels_ = LayerKernels::load(fields_);
        }
        kind_.launch({fields_, tensors_, sizes, *kernels_, inputs, outputs, workspace, stream});
    });
}

nvinfer1::IPluginV3* AttentionPlugin::attachToContext(
    nvinfer1::IPluginResourceContext* context) noexcept {
    return clone();
}

nvinfer1::PluginFieldCollection const* AttentionPlugin::getFieldsToSerialize() noexcept {
    int32_t const result = reported([&] {
        serialized_ = fields_to_serialize(kind_, fields_);
        collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    });
    return result == 0 ? &collection_ : nullptr;
}

}  // namespace ssd_export
