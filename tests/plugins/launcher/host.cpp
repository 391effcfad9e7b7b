// What TensorRT does with the plugin, for a caller without TensorRT: creates it, serializes and
// deserializes it, attaches it to a context, sets shapes and runs it.

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <dlfcn.h>

#include <NvInferRuntime.h>

#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;

struct Tensor {  // as ctypes hands it over
    int64_t dims[8];
    int32_t num_dims;
    int32_t type;
    void* data;
};

// Fields that own their data, as those of an engine file do.
class OwnFields {
public:
    explicit OwnFields(PluginFieldCollection const& given) : data_(given.nbFields) {
        for (int32_t i = 0; i < given.nbFields; ++i) {
            PluginField const& field = given.fields[i];
            size_t const size =
                field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kFLOAT32
                    ? 4
                    : 1;
            auto const* bytes = static_cast<char const*>(field.data);
            data_[i].assign(bytes, bytes + size * field.length);
            names_.emplace_back(field.name);
            fields_.emplace_back(nullptr, data_[i].data(), field.type, field.length);
        }
        for (size_t i = 0; i < fields_.size(); ++i) {
            fields_[i].name = names_[i].c_str();
        }
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }
    PluginFieldCollection const* get() const { return &collection_; }

private:
    std::vector<std::string> data_;
    std::vector<std::string> names_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

// The creator of a kind of node; null where the library has none of that name.
IPluginCreatorV3One* creator_of(void* library, std::string const& kind) {
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    auto get = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = get(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (kind == creator->getPluginName()) {
            return creator;
        }
    }
    return nullptr;
}

IPluginV3OneRuntime* runtime_of(IPluginV3* plugin) {
    return static_cast<IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

std::vector<PluginTensorDesc> descs_of(Tensor const* tensors, int32_t count) {
    std::vector<PluginTensorDesc> descs(count);
    for (int32_t i = 0; i < count; ++i) {
        descs[i].dims.nbDims = tensors[i].num_dims;
        std::memcpy(descs[i].dims.d, tensors[i].dims, sizeof tensors[i].dims);
        descs[i].type = static_cast<DataType>(tensors[i].type);
        descs[i].format = TensorFormat::kLINEAR;
    }
    return descs;
}

}  // namespace

// The plugin of these fields as it stands in a running engine, or null after a message on stderr.
PUBLIC void* host_attached(void* library, char const* kind, PluginField const* fields,
                           int32_t num_fields) {
    IPluginCreatorV3One* creator = creator_of(library, kind);
    if (creator == nullptr) {
        return nullptr;
    }
    PluginFieldCollection const given{num_fields, fields};
    IPluginV3* built = creator->createPlugin("node", &given, TensorRTPhase::kBUILD);
    if (built == nullptr) {
        return nullptr;
    }
    OwnFields const file(*runtime_of(built)->getFieldsToSerialize());
    delete built;
    IPluginV3* loaded = creator->createPlugin("node", file.get(), TensorRTPhase::kRUNTIME);
    if (loaded == nullptr) {
        return nullptr;
    }
    IPluginV3* attached = runtime_of(loaded)->attachToContext(nullptr);
    delete loaded;
    return attached;
}

PUBLIC void host_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

PUBLIC int64_t host_workspace(void* plugin, Tensor const* tensors, int32_t num_inputs,
                              int32_t num_outputs) {
    std::vector<DynamicPluginTensorDesc> most(num_inputs + num_outputs);
    auto const descs = descs_of(tensors, num_inputs + num_outputs);
    for (size_t i = 0; i < most.size(); ++i) {
        most[i].desc = descs[i];
        most[i].desc.dims.d[0] = -1;
        most[i].max = descs[i].dims;
    }
    auto* build = static_cast<IPluginV3OneBuildV2*>(
        static_cast<IPluginV3*>(plugin)->getCapabilityInterface(PluginCapabilityType::kBUILD));
    return static_cast<int64_t>(
        build->getWorkspaceSize(most.data(), num_inputs, most.data() + num_inputs, num_outputs));
}

PUBLIC int32_t host_shapes(void* plugin, Tensor const* tensors, int32_t num_inputs,
                           int32_t num_outputs) {
    auto const descs = descs_of(tensors, num_inputs + num_outputs);
    return runtime_of(static_cast<IPluginV3*>(plugin))
        ->onShapeChange(descs.data(), num_inputs, descs.data() + num_inputs, num_outputs);
}

PUBLIC int32_t host_enqueue(void* plugin, Tensor const* tensors, int32_t num_inputs,
                            int32_t num_outputs, void* workspace, void* stream) {
    auto const descs = descs_of(tensors, num_inputs + num_outputs);
    std::vector<void const*> inputs;
    std::vector<void*> outputs;
    for (int32_t i = 0; i < num_inputs + num_outputs; ++i) {
        i < num_inputs ? inputs.push_back(tensors[i].data) : outputs.push_back(tensors[i].data);
    }
    return runtime_of(static_cast<IPluginV3*>(plugin))
        ->enqueue(descs.data(), descs.data() + num_inputs, inputs.data(), outputs.data(), workspace,
                  static_cast<cudaStream_t>(stream));
}
