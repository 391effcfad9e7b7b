#include "ssd_export/decode_attention_plugin.h"

#include <stdexcept>
#include <string>

#include "ssd_export/layer_launch.h"
#include "ssd_export/messages.h"

namespace ssd_export {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr uintptr_t kAlignment = 16;  // bytes that the kernels load at once

void check_pointers(NodeTensors const& tensors, void const* const* inputs, void* const* outputs) {
    for (int32_t output = 1; output < tensors.num_outputs(); ++output) {
        int32_t const input = tensors.aliased_input(output);
        if (outputs[output] != inputs[input]) {
            throw std::runtime_error(tensors.name_of(input) +
                                     " and its output have different buffers; build with "
                                     "PreviewFeature.ALIASED_PLUGIN_IO_10_03 and bind one buffer "
                                     "to both");
        }
    }
    for (int32_t input = tensors.kFirstCache; input < tensors.num_inputs(); ++input) {
        if (reinterpret_cast<uintptr_t>(inputs[input]) % kAlignment != 0) {
            throw std::runtime_error(
                tensors.name_of(input) +
                " is not aligned to 16 bytes; bind buffers as cudaMalloc returns them");
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
        copy->kernels_ = kernels_;
    });
    return copy;
}

int32_t DecodeAttentionPlugin::getNbOutputs() const noexcept { return tensors_.num_outputs(); }

int32_t DecodeAttentionPlugin::getAliasedInput(int32_t output) noexcept {
    return tensors_.aliased_input(output);
}

int32_t DecodeAttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t num_outputs,
                                                  DataType const* inputs,
                                                  int32_t num_inputs) const noexcept {
    return reported([&] {
        tensors_.check_num_inputs(num_inputs);
        for (int32_t output = 0; output < num_outputs; ++output) {
            outputs[output] = tensors_.type_of(num_inputs + output, fields_.data_type());
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
        tensors_.check_num_inputs(num_inputs);
        using nvinfer1::DimensionOperation;
        outputs[0] = inputs[tensors_.kHeads];
        for (int32_t group = 0; group < fields_.num_groups; ++group) {
            nvinfer1::IDimensionExpr const& heads =
                *inputs[tensors_.input_of(group, kPastKey)].d[1];
            nvinfer1::IDimensionExpr const& keys_and_values =
                *builder.operation(DimensionOperation::kPROD, *builder.constant(2), heads);
            outputs[0].d[1] =
                builder.operation(DimensionOperation::kSUB, *outputs[0].d[1], keys_and_values);
        }
        for (int32_t output = 1; output < num_outputs; ++output) {
            outputs[output] = inputs[tensors_.aliased_input(output)];
        }
    });
}

bool DecodeAttentionPlugin::supportsFormatCombination(
    int32_t place, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t num_inputs,
    int32_t num_outputs) noexcept {
    nvinfer1::PluginTensorDesc const& tensor = tensors[place].desc;
    bool fits = false;
    reported([&] {
        tensors_.check_num_inputs(num_inputs);
        fits = tensor.format == nvinfer1::TensorFormat::kLINEAR &&
               tensor.type == tensors_.type_of(place, fields_.data_type());
    });
    return fits;
}

int32_t DecodeAttentionPlugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs,
                                               int32_t num_inputs,
                                               nvinfer1::DynamicPluginTensorDesc const* outputs,
                                               int32_t num_outputs) noexcept {
    return reported([&] {
        tensors_.check_num_inputs(num_inputs);
        sizes_of(fields_, tensors_,
                 [&](int32_t input) -> Dims const& { return inputs[input].desc.dims; });
    });
}

size_t DecodeAttentionPlugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs,
                                               int32_t num_inputs,
                                               nvinfer1::DynamicPluginTensorDesc const* outputs,
                                               int32_t num_outputs) const noexcept {
    size_t num_bytes = 0;
    reported([&] {
        tensors_.check_num_inputs(num_inputs);
        num_bytes = workspace_bytes(
            fields_, sizes_of(fields_, tensors_,
                              [&](int32_t input) -> Dims const& { return inputs[input].max; }));
    });
    return num_bytes;
}

int32_t DecodeAttentionPlugin::onShapeChange(nvinfer1::PluginTensorDesc const* inputs,
                                             int32_t num_inputs,
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

int32_t DecodeAttentionPlugin::enqueue(nvinfer1::PluginTensorDesc const* input_descs,
                                       nvinfer1::PluginTensorDesc const* output_descs,
                                       void const* const* inputs, void* const* outputs,
                                       void* workspace, cudaStream_t stream) noexcept {
    return reported([&] {
        LayerSizes const sizes = sizes_of(fields_, tensors_, [&](int32_t input) -> Dims const& {
            return input_descs[input].dims;
        });
        check_pointers(tensors_, inputs, outputs);
        if (kernels_ == nullptr) {
            kernels_ = LayerKernels::load(fields_);
        }
        launch_layer(fields_, tensors_, sizes, *kernels_, inputs, outputs[0], workspace, stream);
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
