// The creator of DecodeAttention and the two functions by which TensorRT finds it in this library.

#include <exception>
#include <vector>

#include <NvInferRuntime.h>

#include "ssd_export/attention_fields.h"
#include "ssd_export/decode_attention_plugin.h"
#include "ssd_export/messages.h"

namespace ssd_export {
namespace {

class DecodeAttentionCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    DecodeAttentionCreator() : names_(field_names()) {
        collection_ = {static_cast<int32_t>(names_.size()), names_.data()};
    }

    nvinfer1::IPluginV3* createPlugin(char const* name,
                                      nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        try {
            static constexpr nvinfer1::PluginFieldCollection kNone{0, nullptr};
            return new DecodeAttentionPlugin(read_fields(fields == nullptr ? kNone : *fields));
        } catch (std::exception const& error) {
            report_error(std::string(name == nullptr ? "" : name) + ": " + error.what());
            return nullptr;
        }
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override {
        return &collection_;
    }
    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

private:
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
    static ssd_export::DecodeAttentionCreator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}
