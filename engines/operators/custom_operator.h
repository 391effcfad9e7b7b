// What the operators of ONNX Runtime have in common.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <vector>

namespace ssd_operators {

// Runs something of C++ for ONNX Runtime, which is C.
template <class Work>
OrtStatus* status_of(Work&& work) noexcept {
    try {
        work();
        return nullptr;
    } catch (Ort::Exception const& error) {
        return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
    } catch (std::exception const& error) {
        return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
}

// Calls work(i) for i < count, with the threads of the session.
template <class Work>
void parallel_for(Ort::KernelContext const& context, int64_t count, Work const& work) {
    context.ParallelFor(
        [](void* data, size_t number) {
            (*static_cast<Work const*>(data))(static_cast<int64_t>(number));
        },
        static_cast<size_t>(count), 0, const_cast<Work*>(&work));
}

// Memory of the calling thread, at least so many numbers, until it asks again.
inline float* scratch_of(int64_t count) {
    thread_local std::vector<float> memory;
    if (memory.size() < static_cast<size_t>(count)) {
        memory.resize(static_cast<size_t>(count));
    }
    return memory.data();
}

// An operator: Compute is made from a node's attributes and has compute(context). Types are those
// of its inputs and outputs; the last of them may be optional, or stand for any number of any type.
template <class Compute>
struct Kernel {
    Compute compute;

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return status_of([&] { compute.compute(Ort::KernelContext(context)); });
    }
};

template <class Operator, class Compute>
struct CustomOperator : Ort::CustomOpBase<Operator, Kernel<Compute>, true> {
    OrtStatusPtr CreateKernelV2(OrtApi const&, OrtKernelInfo const* info, void** kernel) const {
        return status_of(
            [&] { *kernel = new Kernel<Compute>{Compute(Ort::ConstKernelInfo(info))}; });
    }
    char const* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
};

}  // namespace ssd_operators
