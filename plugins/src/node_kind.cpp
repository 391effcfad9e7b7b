#include "ssd_export/node_kind.h"

#include "ssd_export/layer_launch.h"
#include "ssd_export/window_launch.h"

namespace ssd_export {
namespace {

#define SSD_KERNEL(kernel) \
    {"kernel_" kernel "_image", "kernel_" kernel "_name", "kernel_" kernel "_shared_bytes"}

constexpr KernelNames kStepKernels[] = {SSD_KERNEL("layer"), SSD_KERNEL("part"), SSD_KERNEL("sum")};
constexpr KernelNames kWindowKernels[] = {SSD_KERNEL("evict"), SSD_KERNEL("attend")};
constexpr KernelNames kSettleKernels[] = {SSD_KERNEL("write")};

constexpr TokenTensor kStepInputs[] = {
    {"heads", TensorForm::kHeads},
    {"position", TensorForm::kOfRows},
    {"prompt_length", TensorForm::kOfRows},
};
constexpr TokenTensor kStepOutputs[] = {{"out", TensorForm::kOut}};
constexpr TokenTensor kWindowInputs[] = {
    {"heads", TensorForm::kHeads},
    {"position", TensorForm::kOfRows},
    {"prompt_length", TensorForm::kOfRows},
    {"active", TensorForm::kOfRows},
};
constexpr TokenTensor kWindowOutputs[] = {
    {"out", TensorForm::kOut},
    {"logits", TensorForm::kLogits},
    {"largest", TensorForm::kOfQuery},
    {"total", TensorForm::kOfQuery},
};
constexpr TokenTensor kSettleInputs[] = {
    {"heads", TensorForm::kHeads},     {"position", TensorForm::kOfRows},
    {"counts", TensorForm::kOfRows},   {"logits", TensorForm::kLogits},
    {"largest", TensorForm::kOfQuery}, {"total", TensorForm::kOfQuery},
};

}  // namespace

NodeKind const kDecodeAttention{
    "DecodeAttention",
    "4",  // 3 had a node for each head group
    false,
    table_of(kStepInputs),
    table_of(kStepOutputs),
    table_of(kStepKernels),
    layer_workspace_bytes,
    launch_layer,
};
NodeKind const kWindowAttention{
    "WindowAttention",
    "1",
    true,
    table_of(kWindowInputs),
    table_of(kWindowOutputs),
    table_of(kWindowKernels),
    no_workspace_bytes,
    launch_window,
};
NodeKind const kWindowSettle{
    "WindowSettle",          "1",           true,
    table_of(kSettleInputs), {nullptr, 0},  table_of(kSettleKernels),
    no_workspace_bytes,      launch_settle,
};

}  // namespace ssd_export
