// The creators of all kinds of nodes and the two functions by which TensorRT finds it in this
// library.

#include <exception>
#include <iterator>
#include <vector>

#include <NvInferRuntime.h>

#include "ssd_export/attention_fields.h"
#include "ssd_export/attention_plugin.h"
#include "ssd_export/messages.h"
#include "ssd_export/node_kind.h"

namespace ssd_export {
namespace {

class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Creator(NodeKind const& kind) : kind_(kind), names_(field_names(kind)) {
        collection_ = {static_cast<int32_t>(names_.size()), names_.data()};
    }

    nvinfer1::IPluginV3* createPlugin(char const* name,
                                      nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        try {
            static constexpr nvinfer1::PluginFieldCollection kNone{0, nullptr};
            return new AttentionPlugin(kind_,
                                       read_fields(kind_, fields == nullptr ? kNone : *fields));
        } catch (std::exception const& error) {
            report_error(std::string(name == nullptr ? "" : name) + ": " + error.what());
            return nullptr;
        }
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override {
        return &collection_;
    }
    char const* getPluginName() const noexcept override { return kind_.name; }
    char const* getPluginVersion() const noexcept override { return kind_.version; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

private:
    NodeKind const& kind_;
    std::vector<nvinfer1::PluginField> names_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace ssd_export

#define SSD_PUBLIC extern "C" __attribute__((visibility("default")))

SSD_PUBLIC void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    ssd_export::set_logger_finder(finder);
}

SSD_PUBLIC nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    using namespace ssd_export;
    static Creator step(kDecodeAttention), window(kWindowAttention), settle(kWindowSettle);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&step, &window, &settle};
    count = static_cast<int32_t>(std::size(creators));
    return creators;
}
