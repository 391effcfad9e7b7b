#pragma once

#include <memory>
#include <utility>
#include <vector>

#include <NvInferRuntime.h>

#include "ssd_export/attention_fields.h"
#include "ssd_export/kernel.h"
#include "ssd_export/layer_shapes.h"
#include "ssd_export/node_kind.h"

namespace ssd_export {

// A node of any kind. Every present_* output is its past_* input, written in place; nothing is
// copied.
class AttentionPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuildV2,
                              public nvinfer1::IPluginV3OneRuntime {
public:
    AttentionPlugin(NodeKind const& kind, AttentionFields fields)
        : kind_(kind), fields_(std::move(fields)), tensors_(kind_, fields_) {}

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override { return kind_.name; }
    char const* getPluginVersion() const noexcept override { return kind_.version; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // IPluginV3OneBuildV2
    int32_t getNbOutputs() const noexcept override;
    int32_t getAliasedInput(int32_t output) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t num_outputs,
                               nvinfer1::DataType const* inputs,
                               int32_t num_inputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                            nvinfer1::DimsExprs const* shapes, int32_t num_shapes,
                            nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t place, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                   int32_t num_inputs, int32_t num_outputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* outputs,
                            int32_t num_outputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* outputs,
                            int32_t num_outputs) const noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t num_inputs,
                          nvinfer1::PluginTensorDesc const* outputs,
                          int32_t num_outputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs,
                    nvinfer1::PluginTensorDesc const* output_descs, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(
        nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    NodeKind const& kind_;
    AttentionFields fields_;
    NodeTensors tensors_;
    // loaded when shapes are set, before any stream is captured
    std::shared_ptr<LayerKernels const> kernels_;
    std::vector<nvinfer1::PluginField> serialized_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace ssd_export
