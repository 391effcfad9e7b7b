#include "trt/cuda_device.h"

#include <dlfcn.h>

#include <cuda.h>

#include "cuda_driver.h"
#include "failure.h"

// The calls that CudaDriver does not have, by the names that cuda.h maps them to.
// clang-format off
#define SSD_CUDA_CALLS(X) \
    X(cuGetErrorString) X(cuDeviceGet) X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease) \
    X(cuCtxSetCurrent) X(cuMemGetInfo) X(cuMemAlloc) X(cuMemFree) X(cuMemcpyHtoDAsync) \
    X(cuMemcpyDtoHAsync) X(cuMemcpyDtoDAsync) X(cuMemcpy2DAsync) X(cuMemsetD8Async) \
    X(cuStreamCreate) X(cuStreamDestroy) X(cuStreamSynchronize) X(cuStreamBeginCapture) \
    X(cuStreamEndCapture) X(cuGraphInstantiateWithFlags) X(cuGraphLaunch) X(cuGraphDestroy) \
    X(cuGraphExecDestroy) X(cuModuleLoadData) X(cuModuleGetFunction) X(cuModuleUnload) \
    X(cuLaunchKernel)
// clang-format on
#define SSD_DECLARE(name) decltype(&::name) name;
#define SSD_NAME(name) #name
#define SSD_FIND(name) find(library, SSD_NAME(name), calls.name);

namespace ssd_runtime {

struct CudaCalls {
    SSD_CUDA_CALLS(SSD_DECLARE)
};

namespace {

template <typename Function>
void find(void* library, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) {
        fail(SSD_UNAVAILABLE, "libcuda.so.1 has no ", name, "; update the NVIDIA driver");
    }
}

CudaCalls const& cuda_calls() {
    static CudaCalls const found = [] {
        CudaDriver::get();  // says what is missing, and keeps the library open
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        CudaCalls calls{};
        SSD_CUDA_CALLS(SSD_FIND)
        return calls;
    }();
    return found;
}

CUstream of(CudaStream stream) { return static_cast<CUstream>(stream); }

}  // namespace

CudaDevice::CudaDevice(int number) : calls_(cuda_calls()) {
    int const count = CudaDriver::get().num_devices();
    if (number < 0 || number >= count) {
        fail(SSD_INVALID_ARGUMENT, "device ", number, " is not one of the ", count,
             " GPUs of this machine; ssd_devices lists them");
    }
    check(calls_.cuDeviceGet(&device_, number), "cuDeviceGet");
    CUcontext context = nullptr;
    check(calls_.cuDevicePrimaryCtxRetain(&context, device_), "cuDevicePrimaryCtxRetain");
    context_ = context;
}

CudaDevice::~CudaDevice() { calls_.cuDevicePrimaryCtxRelease(device_); }

void CudaDevice::use() const {
    check(calls_.cuCtxSetCurrent(static_cast<CUcontext>(context_)), "cuCtxSetCurrent");
}

void CudaDevice::try_use() const noexcept {
    calls_.cuCtxSetCurrent(static_cast<CUcontext>(context_));
}

int64_t CudaDevice::compute_capability() const {
    return CudaDriver::get().compute_capability(device_);
}

uint64_t CudaDevice::free_bytes() const {
    use();
    size_t free_now = 0;
    size_t total = 0;
    check(calls_.cuMemGetInfo(&free_now, &total), "cuMemGetInfo");
    return free_now;
}

DeviceAddress CudaDevice::allocate(size_t num_bytes) const {
    use();
    CUdeviceptr address = 0;
    CUresult const result = calls_.cuMemAlloc(&address, num_bytes);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        fail(SSD_OUT_OF_MEMORY, "the GPU gave no ", num_bytes,
             " bytes; generate fewer images at once, or close what uses it");
    }
    check(result, "cuMemAlloc");
    return address;
}

void CudaDevice::free(DeviceAddress address) const noexcept {
    try_use();
    calls_.cuMemFree(address);
}

void CudaDevice::check(int result, char const* call) const {
    if (result != CUDA_SUCCESS) {
        char const* reason = nullptr;
        calls_.cuGetErrorString(static_cast<CUresult>(result), &reason);
        fail(SSD_INTERNAL_ERROR, call, ": ", reason == nullptr ? "unknown error" : reason,
             "; nvidia-smi shows whether GPU and driver work");
    }
}

DeviceQueue::DeviceQueue(CudaDevice const& device) : device_(device) {
    device_.use();
    CUstream stream = nullptr;
    device_.check(device_.calls().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING),
                  "cuStreamCreate");
    stream_ = stream;
}

DeviceQueue::~DeviceQueue() {
    try_synchronize();
    device_.calls().cuStreamDestroy(of(stream_));
}

void DeviceQueue::upload(DeviceAddress target, void const* source, size_t num_bytes) {
    device_.use();
    if (num_bytes > 0) {
        device_.check(device_.calls().cuMemcpyHtoDAsync(target, source, num_bytes, of(stream_)),
                      "cuMemcpyHtoDAsync");
    }
}

void DeviceQueue::queue_download(void* target, DeviceAddress source, size_t num_bytes) {
    device_.use();
    device_.check(device_.calls().cuMemcpyDtoHAsync(target, source, num_bytes, of(stream_)),
                  "cuMemcpyDtoHAsync");
}

void DeviceQueue::download(void* target, DeviceAddress source, size_t num_bytes) {
    queue_download(target, source, num_bytes);
    synchronize();
}

void DeviceQueue::fill(DeviceAddress target, unsigned char byte, size_t num_bytes) {
    device_.use();
    device_.check(device_.calls().cuMemsetD8Async(target, byte, num_bytes, of(stream_)),
                  "cuMemsetD8Async");
}

void DeviceQueue::copy(DeviceAddress target, DeviceAddress source, size_t num_bytes) {
    device_.use();
    device_.check(device_.calls().cuMemcpyDtoDAsync(target, source, num_bytes, of(stream_)),
                  "cuMemcpyDtoDAsync");
}

void DeviceQueue::copy_rows(Rows target, Rows source, size_t width, size_t count) {
    device_.use();
    CUDA_MEMCPY2D what{};
    what.srcMemoryType = what.dstMemoryType = CU_MEMORYTYPE_DEVICE;
    what.srcDevice = source.address;
    what.srcPitch = source.pitch;
    what.dstDevice = target.address;
    what.dstPitch = target.pitch;
    what.WidthInBytes = width;
    what.Height = count;
    device_.check(device_.calls().cuMemcpy2DAsync(&what, of(stream_)), "cuMemcpy2DAsync");
}

void DeviceQueue::synchronize() {
    device_.use();
    device_.check(device_.calls().cuStreamSynchronize(of(stream_)), "cuStreamSynchronize");
    sources_.clear();
}

void DeviceQueue::try_synchronize() noexcept {
    try {
        synchronize();
    } catch (Failure const&) {
        // A stream that failed is waited for no longer; what was made on it goes all the same.
    }
}

DeviceQueue::Graph::Graph(DeviceQueue& queue, std::function<void()> const& work) : queue_(queue) {
    CudaDevice const& device = queue.device_;
    CudaCalls const& calls = device.calls();
    device.use();
    CUstream const stream = of(queue.stream_);
    device.check(calls.cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL),
                 "cuStreamBeginCapture");
    CUgraph graph = nullptr;
    try {
        work();
    } catch (...) {
        calls.cuStreamEndCapture(stream, &graph);  // leaves the stream usable
        if (graph != nullptr) {
            calls.cuGraphDestroy(graph);
        }
        throw;
    }
    device.check(calls.cuStreamEndCapture(stream, &graph), "cuStreamEndCapture");
    CUgraphExec executable = nullptr;
    CUresult const result = calls.cuGraphInstantiateWithFlags(&executable, graph, 0);
    calls.cuGraphDestroy(graph);
    device.check(result, "cuGraphInstantiate");
    executable_ = executable;
}

DeviceQueue::Graph::~Graph() {
    queue_.try_synchronize();
    queue_.device_.calls().cuGraphExecDestroy(static_cast<CUgraphExec>(executable_));
}

void DeviceQueue::Graph::launch() {
    CudaDevice const& device = queue_.device_;
    device.use();
    device.check(
        device.calls().cuGraphLaunch(static_cast<CUgraphExec>(executable_), of(queue_.stream_)),
        "cuGraphLaunch");
}

DeviceKernel::DeviceKernel(CudaDevice const& device, char const* image, char const* entry)
    : device_(device) {
    device_.use();
    CUmodule loaded = nullptr;
    device_.check(device_.calls().cuModuleLoadData(&loaded, image), "cuModuleLoadData");
    module_ = loaded;
    CUfunction function = nullptr;
    CUresult const result = device_.calls().cuModuleGetFunction(&function, loaded, entry);
    if (result != CUDA_SUCCESS) {
        device_.calls().cuModuleUnload(loaded);
        device_.check(result, "cuModuleGetFunction");
    }
    function_ = function;
}

DeviceKernel::~DeviceKernel() {
    device_.try_use();
    device_.calls().cuModuleUnload(static_cast<CUmodule>(module_));
}

void DeviceKernel::launch(DeviceQueue& queue, unsigned grid_x, unsigned grid_y,
                          unsigned num_threads, void** arguments) {
    device_.use();
    device_.check(device_.calls().cuLaunchKernel(static_cast<CUfunction>(function_), grid_x, grid_y,
                                                 1, num_threads, 1, 1, 0, of(queue.stream()),
                                                 arguments, nullptr),
                  "cuLaunchKernel");
}

}  // namespace ssd_runtime
