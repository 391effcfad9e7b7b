#include "ort/ort_session.h"

#include <algorithm>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "failure.h"
#include "layer_attention.h"
#include "machine.h"

namespace ssd_runtime {
namespace {

constexpr int64_t small_hidden_size = 512;  // below it a second thread costs more than it brings
char const gpu_help[] =
    "the provider cuda needs a GPU and the CUDA libraries of this ONNX Runtime, the provider cpu "
    "needs neither";

std::string one_line(std::string message) {
    message = message.substr(0, std::min<size_t>(message.find('\n'), 200));
    return message;
}

std::string file_of(std::string const& graph, bool is_fused) {
    return "onnx/" + graph + (is_fused ? "_fused.onnx" : ".onnx");
}

// Opening a session frees about as much memory as it keeps (weights before they were packed), which
// glibc would hold.
void give_back_freed_memory() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

}  // namespace

bool holds_language_model(std::string const& graph) {
    return graph.rfind("prefill", 0) == 0 || graph.rfind("decode_", 0) == 0;
}

void need_ort_api() {
    static OrtApi const* const api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
        fail(SSD_UNAVAILABLE, "ONNX Runtime ", OrtGetApiBase()->GetVersionString(),
             " was loaded and this ssd_runtime was built for 1.", ORT_API_VERSION,
             " or newer; install a newer libonnxruntime.so, or build ssd_runtime again");
    }
    static bool const once = [] {
        Ort::InitApi(api);
        return true;
    }();
    (void)once;
}

ONNXTensorElementDataType ort_type(Dtype dtype) {
    switch (dtype) {
    case Dtype::float32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Dtype::float16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Dtype::bfloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case Dtype::int8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    case Dtype::int32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case Dtype::int64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

OrtSessions::OrtSessions(Bundle const& bundle, std::string const& provider, int device,
                         int num_threads)
    : bundle_(bundle),
      env_((need_ort_api(), ORT_LOGGING_LEVEL_FATAL), "ssd_runtime"),
      is_cuda_(provider == "cuda"),
      device_(device) {
    if (!is_cuda_ && provider != "cpu") {
        fail(SSD_INVALID_ARGUMENT, "unknown provider ", in_quotes(provider),
             "; use one of cpu, cuda");
    }
    std::vector<std::string> const available = Ort::GetAvailableProviders();
    if (is_cuda_ &&
        std::find(available.begin(), available.end(), "CUDAExecutionProvider") == available.end()) {
        fail(SSD_UNAVAILABLE,
             "this onnxruntime has no CUDAExecutionProvider; install one for GPUs, or use the "
             "provider cpu");
    }
    if (!is_cuda_ && bundle.config().dtype == Dtype::bfloat16) {
        fail(SSD_UNAVAILABLE,
             "ONNX Runtime has no bfloat16 on the CPU; use the provider cuda, or export with "
             "--dtype fp32");
    }
    bool const is_small = bundle.config().model.hidden_size <= small_hidden_size;
    int const limit = thread_limit(num_cpus(), cpus_of_machine());
    num_threads_ = num_threads > 0 ? num_threads : is_small ? 1 : limit;
    holds_one_ = !is_cuda_ && !is_small;
    choose_decoder();
    get("prefill");  // a provider that cannot start says so before anything is allocated
}

void OrtSessions::choose_decoder() {
    image_decoder_ = ssd_runtime::image_decoder;
    if (is_cuda_) {
        why_float_decoder_ =
            "images are decoded in float: the int8 image decoder is of the provider cpu";
    } else if (!multiplies_int8_exactly()) {
        why_float_decoder_ =
            "images are decoded in float: this processor multiplies int8 without the instructions "
            "that keep every bit (AVX-512 VNNI, AVX-VNNI, ARM)";
    } else if (bundle_.config().graphs.count(int8_decoder) > 0) {
        image_decoder_ = int8_decoder;
    }
}

int OrtSessions::num_threads() const { return num_threads_ > 0 ? num_threads_ : num_cpus(); }

std::shared_ptr<Ort::Session> OrtSessions::get(std::string const& graph) {
    std::lock_guard<std::mutex> const lock(mutex_);
    if (holds_one_ && holds_language_model(graph)) {
        for (auto it = sessions_.begin(); it != sessions_.end();) {
            bool const gone = it->first != graph && holds_language_model(it->first);
            it = gone ? sessions_.erase(it) : std::next(it);
        }
    }
    auto const found = sessions_.find(graph);
    if (found != sessions_.end()) {
        return found->second;
    }
    std::shared_ptr<Ort::Session> session = open(graph);
    sessions_[graph] = session;
    return session;
}

Ort::SessionOptions OrtSessions::options(std::string const& graph) const {
    bool const is_short = graph.rfind("evict", 0) == 0;  // what it sorts is: one thread does it
    int const num_threads = is_short ? 1 : num_threads_;
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(num_threads);
    options.SetInterOpNumThreads(1);
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    if (num_threads != 1) {  // workers would spin after each run, on cores that others need
        options.AddConfigEntry("session.intra_op.allow_spinning", "0");
    }
    std::string const& weights = bundle_.config().weight_format;
    if (weights == "fp8") {  // no kernel on the CPU: multiplied out when the graph is opened
        options.AddConfigEntry("session.disable_quant_qdq", "1");
    } else if (weights != "none") {  // MatMulNBits reads the codes as they are
        options.AddConfigEntry("session.qdq_matmulnbits_accuracy_level", "4");
        options.AddConfigEntry("session.qdq_matmulnbits_block_size", "128");
        options.AddConfigEntry("session.disable_qdq_constant_folding", "1");
    }
    if (is_cuda_) {
        OrtCUDAProviderOptionsV2* cuda = nullptr;
        Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
        std::unique_ptr<OrtCUDAProviderOptionsV2, void (*)(OrtCUDAProviderOptionsV2*)> const owner(
            cuda, [](auto* made) { Ort::GetApi().ReleaseCUDAProviderOptions(made); });
        std::string const id = std::to_string(device_);
        char const* const keys[] = {"device_id"};
        char const* const values[] = {id.c_str()};
        Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(cuda, keys, values, 1));
        options.AppendExecutionProvider_CUDA_V2(*cuda);
    }
    return options;
}

bool OrtSessions::fuses(std::string const& graph) const {
    return !is_cuda_ && bundle_.has(file_of(graph, true));
}

std::shared_ptr<Ort::Session> OrtSessions::open(std::string const& graph) const {
    bool const is_fused = fuses(graph);
    std::string const path = bundle_.file(file_of(graph, is_fused));
    bundle_.config().graph(graph);  // a graph without a contract is refused
    try {
        Ort::SessionOptions session_options = options(graph);
        if (is_fused) {
            Ort::ThrowOnError(ssd_operators::add_operators(session_options));
        }
        auto session = std::make_shared<Ort::Session>(env_, path.c_str(), session_options);
        give_back_freed_memory();
        check_interface(*session, graph);
        return session;
    } catch (Ort::Exception const& error) {
        fail(SSD_UNAVAILABLE, "onnxruntime could not open ", path, " (", one_line(error.what()),
             "); ",
             is_cuda_ ? gpu_help : "export the bundle again, or install a newer onnxruntime");
    }
}

// The graph's own names and types must be the contract's: everything else is bound by them.
void OrtSessions::check_interface(Ort::Session const& session, std::string const& graph) const {
    GraphSpec const& spec = bundle_.config().graph(graph);
    std::map<std::string, ONNXTensorElementDataType> wanted, found;
    Ort::AllocatorWithDefaultOptions allocator;
    for (TensorSpec const& tensor : spec.inputs) {
        wanted["in " + tensor.name] = ort_type(tensor.dtype);
    }
    for (TensorSpec const& tensor : spec.outputs) {
        wanted["out " + tensor.name] = ort_type(tensor.dtype);
    }
    for (size_t i = 0; i < session.GetInputCount(); ++i) {
        found[std::string("in ") + session.GetInputNameAllocated(i, allocator).get()] =
            session.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetElementType();
    }
    for (size_t i = 0; i < session.GetOutputCount(); ++i) {
        found[std::string("out ") + session.GetOutputNameAllocated(i, allocator).get()] =
            session.GetOutputTypeInfo(i).GetTensorTypeAndShapeInfo().GetElementType();
    }
    if (wanted != found) {
        fail(SSD_BAD_BUNDLE, "onnx/", graph,
             ".onnx has other inputs or outputs than the bundle says; export it again with "
             "--force, or copy it again from where it came");
    }
}

}  // namespace ssd_runtime
