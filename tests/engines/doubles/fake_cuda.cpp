// A libcuda.so.1 over host memory for machines without a GPU: it really copies, captures and
// replays, and is as strict as the driver or stricter.
//
//   - Every access is checked to lie inside one allocation; fresh memory holds 0xCD.
//   - What is queued on a stream runs when something waits for it, and not before.
//   - A context is current for one thread.
//   - While a stream is captured nothing runs, and what a capture forbids is refused.
//   - Nothing may outlive what it was made on.
//
// SSD_FAKE_GPUS (1), SSD_FAKE_CAPABILITY (89), SSD_FAKE_BYTES (1 GiB), SSD_FAKE_REFUSE,
// SSD_FAKE_LOG.
#include "fake_cuda.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include <cuda.h>

#include "noise.h"

#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

using Work = std::function<void()>;

constexpr unsigned char fresh = 0xCD;

struct Device {
    std::recursive_mutex mutex;
    std::map<uint64_t, std::pair<std::unique_ptr<std::byte[]>, size_t>> memory;  // by address
    std::map<void*, std::vector<Work>> queued, captured;                         // by stream
    std::map<void*, std::vector<Work>> graphs;
    std::set<void*> modules;
    std::multiset<std::string> alive;
    std::map<void*, int> made_on;  // by stream
    std::map<std::string, int> calls;
    int retained = 0;
    size_t used = 0;
    uintptr_t next_handle = 0x1000;
};

Device& device() {
    static auto* const made = new Device;
    return *made;
}

thread_local bool is_current = false;
thread_local int captures_here = 0;  // the mode is that of the thread: others go on

long number(char const* variable, long otherwise) {
    char const* const text = std::getenv(variable);
    return text == nullptr ? otherwise : std::atol(text);
}

template <typename Handle>
Handle new_handle() {
    return reinterpret_cast<Handle>(++device().next_handle * 16);
}

// The lock of a call, after it is logged; refusal: what the call answers instead.
class Call {
public:
    // function: with the suffix of its version, _v2.
    Call(char const* function, bool needs_context, bool allowed_in_capture = false)
        : lock_(device().mutex) {
        std::string const name = std::string(function).substr(0, std::string(function).find('_'));
        fake::log(name);
        if (needs_context && !is_current) {
            refusal = CUDA_ERROR_INVALID_CONTEXT;
        } else if (!allowed_in_capture && captures_here > 0) {
            refusal = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        } else if (fake::refuses(name)) {
            refusal = CUDA_ERROR_UNKNOWN;
        }
    }
    CUresult refusal = CUDA_SUCCESS;

private:
    std::lock_guard<std::recursive_mutex> lock_;
};

#define CALL(...)                           \
    Call const call(__func__, __VA_ARGS__); \
    if (call.refusal != CUDA_SUCCESS) {     \
        return call.refusal;                \
    }

void run(void* stream) {
    std::vector<Work> const work = std::move(device().queued.at(stream));
    device().queued[stream].clear();
    for (Work const& one : work) {
        one();
    }
}

}  // namespace

namespace fake {

void die(std::string const& message) {
    std::fprintf(stderr, "double: %s\n", message.c_str());
    std::abort();
}

void log(std::string const& line) {
    static std::FILE* const file = [] {
        char const* const path = std::getenv("SSD_FAKE_LOG");
        return path == nullptr ? nullptr : std::fopen(path, "w");
    }();
    if (file != nullptr) {
        std::fprintf(file, "%s\n", line.c_str());
        std::fflush(file);
    }
}

bool refuses(std::string const& call) {
    std::lock_guard<std::recursive_mutex> const lock(device().mutex);
    int const count = ++device().calls[call];
    char const* const text = std::getenv("SSD_FAKE_REFUSE");
    std::string const asked = text == nullptr ? "" : text;
    size_t const colon = asked.find(':');
    int const from = colon == std::string::npos ? 1 : std::atoi(asked.c_str() + colon + 1);
    return asked.substr(0, colon) == call && count >= from;
}

std::byte* memory(uint64_t address, size_t num_bytes) {
    std::lock_guard<std::recursive_mutex> const lock(device().mutex);
    auto next = device().memory.upper_bound(address);
    if (next != device().memory.begin()) {
        auto const& [base, block] = *std::prev(next);
        if (address + num_bytes <= base + block.second) {
            return reinterpret_cast<std::byte*>(address);
        }
    }
    die("an access outside of device memory");
}

void need_context(std::string const& what) {
    if (!is_current) {
        die(what + ": no context is current in this thread");
    }
}

void queue(void* stream, Work work) {
    std::lock_guard<std::recursive_mutex> const lock(device().mutex);
    if (device().queued.count(stream) == 0) {
        die("there is no such stream");
    }
    auto const captured = device().captured.find(stream);
    (captured == device().captured.end() ? device().queued[stream] : captured->second)
        .push_back(std::move(work));
}

bool is_capturing(void* stream) {
    std::lock_guard<std::recursive_mutex> const lock(device().mutex);
    return device().captured.count(stream) > 0;
}

void born(std::string const& what, void* stream) {
    std::lock_guard<std::recursive_mutex> const lock(device().mutex);
    log("+ " + what);
    device().alive.insert(what);
    ++device().made_on[stream];
}

void gone(std::string const& what, void* stream) {
    std::lock_guard<std::recursive_mutex> const lock(device().mutex);
    log("- " + what);
    need_context(what + " destroyed");
    auto const found = device().alive.find(what);
    if (found == device().alive.end()) {
        die(what + " destroyed twice");
    }
    device().alive.erase(found);
    --device().made_on[stream];
}

}  // namespace fake

PUBLIC CUresult cuInit(unsigned) {
    CALL(false, true)
    return number("SSD_FAKE_GPUS", 1) > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}
PUBLIC CUresult cuGetErrorString(CUresult result, char const** text) {
    *text = result == CUDA_ERROR_NO_DEVICE                    ? "no CUDA-capable device is detected"
            : result == CUDA_ERROR_INVALID_CONTEXT            ? "invalid device context"
            : result == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ? "not permitted while capturing"
                                                              : "a reason of the driver";
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuDeviceGetCount(int* count) {
    *count = static_cast<int>(number("SSD_FAKE_GPUS", 1));
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuDeviceGet(CUdevice* handle, int ordinal) {
    *handle = ordinal;
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    std::snprintf(name, static_cast<size_t>(size), "a double");
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    long const capability = number("SSD_FAKE_CAPABILITY", 89);
    *value = static_cast<int>(attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
                                  ? capability / 10
                                  : capability % 10);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    CALL(false)
    ++device().retained;
    *context = reinterpret_cast<CUcontext>(uintptr_t{0x8002});
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuDevicePrimaryCtxRelease(CUdevice) {
    CALL(false)
    Device& gpu = device();
    if (--gpu.retained > 0) {
        return CUDA_SUCCESS;
    }
    if (!gpu.alive.empty()) {
        fake::die(*gpu.alive.begin() + " is alive when its context goes");
    }
    if (!gpu.graphs.empty() || !gpu.queued.empty() || !gpu.modules.empty()) {
        fake::die("graphs, streams or modules outlive their context");
    }
    if (!gpu.memory.empty()) {
        fake::die("device memory outlives its context");
    }
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuCtxSetCurrent(CUcontext) {
    is_current = device().retained > 0;
    return is_current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
PUBLIC CUresult cuMemGetInfo(size_t* free, size_t* total) {
    CALL(true, true)
    *total = static_cast<size_t>(number("SSD_FAKE_BYTES", 1L << 30));
    *free = *total - std::min(*total, device().used);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuMemAlloc(CUdeviceptr* address, size_t num_bytes) {
    CALL(true)
    if (num_bytes > static_cast<size_t>(number("SSD_FAKE_BYTES", 1L << 30)) - device().used) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    auto block = std::make_unique<std::byte[]>(num_bytes + 256);
    std::memset(block.get(), fresh, num_bytes + 256);
    uint64_t const base = (reinterpret_cast<uint64_t>(block.get()) + 255) / 256 * 256;
    device().memory.emplace(base, std::pair(std::move(block), num_bytes));
    device().used += num_bytes;
    *address = base;
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuMemFree(CUdeviceptr address) {
    CALL(true)
    for (auto const& [stream, work] : device().queued) {  // freeing waits for the device
        run(stream);
    }
    auto const found = device().memory.find(address);
    if (found == device().memory.end()) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    device().used -= found->second.second;
    device().memory.erase(found);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuMemcpyHtoDAsync(CUdeviceptr target, void const* source, size_t size, CUstream s) {
    CALL(true)
    fake::queue(s, [=] { std::memcpy(fake::memory(target, size), source, size); });
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, size_t size, CUstream s) {
    CALL(true)
    fake::queue(s, [=] { std::memcpy(target, fake::memory(source, size), size); });
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuMemcpyHtoD(CUdeviceptr target, void const* source, size_t size) {
    CALL(true)
    std::memcpy(fake::memory(target, size), source, size);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuMemcpyDtoH(void* target, CUdeviceptr source, size_t size) {
    CALL(true)
    std::memcpy(target, fake::memory(source, size), size);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream s) {
    CALL(true, true)
    if (target < source + size && source < target + size) {
        fake::die("a copy onto itself");
    }
    fake::queue(s,
                [=] { std::memcpy(fake::memory(target, size), fake::memory(source, size), size); });
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuMemcpy2DAsync(CUDA_MEMCPY2D const* given, CUstream s) {
    CALL(true, true)
    CUDA_MEMCPY2D const what = *given;
    if (what.srcMemoryType != CU_MEMORYTYPE_DEVICE || what.dstMemoryType != CU_MEMORYTYPE_DEVICE ||
        what.WidthInBytes > std::min(what.srcPitch, what.dstPitch)) {
        fake::die("a copy of rows that overlap, or of host memory");
    }
    fake::queue(s, [=] {
        for (size_t row = 0; row < what.Height; ++row) {
            std::memcpy(fake::memory(what.dstDevice + row * what.dstPitch, what.WidthInBytes),
                        fake::memory(what.srcDevice + row * what.srcPitch, what.WidthInBytes),
                        what.WidthInBytes);
        }
    });
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char byte, size_t size, CUstream s) {
    CALL(true, true)
    fake::queue(s, [=] { std::memset(fake::memory(target, size), byte, size); });
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuModuleLoadData(CUmodule* module, void const* image) {
    CALL(true)
    std::string const text = static_cast<char const*>(image);
    if (text.find(".visible .entry gumbel_noise_kernel(") == std::string::npos) {
        fake::die("an image that is not the noise kernel's PTX");
    }
    *module = new_handle<CUmodule>();
    device().modules.insert(*module);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name) {
    CALL(true)
    *function = reinterpret_cast<CUfunction>(module);  // one function each
    return std::strcmp(name, "gumbel_noise_kernel") == 0 ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
PUBLIC CUresult cuModuleUnload(CUmodule module) {
    CALL(true)
    device().modules.erase(module);
    return CUDA_SUCCESS;
}
// The noise kernel, the only one that is launched by itself.
PUBLIC CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                               unsigned grid_z, unsigned block_x, unsigned block_y,
                               unsigned block_z, unsigned shared, CUstream s, void** arguments,
                               void** extra) {
    CALL(true)
    auto const address = [&](int place) { return *static_cast<uint64_t*>(arguments[place]); };
    auto const integer = [&](int place) { return *static_cast<int32_t*>(arguments[place]); };
    uint64_t const noise = address(0), images = address(1);
    int32_t const first_step = integer(2), num_images = integer(3), codes = integer(4);
    bool const is_right = device().modules.count(function) > 0 && shared == 0 && extra == nullptr &&
                          address(5) == 0 && address(6) == 0 && grid_z == 1 && block_y == 1 &&
                          block_z == 1 && block_x == 128 &&
                          grid_x % static_cast<unsigned>(num_images) == 0 &&
                          grid_y == static_cast<unsigned>((codes + 1023) / 1024);
    if (!is_right) {
        fake::die("the noise kernel is not launched as it should be");
    }
    int64_t const num_steps = grid_x / static_cast<unsigned>(num_images);
    fake::queue(s, [=] {
        auto const count = static_cast<size_t>(num_images);
        std::vector<uint32_t> words(3 * count);
        std::memcpy(words.data(), fake::memory(images, 12 * count), 12 * count);
        std::vector<ssd_runtime::ImageSeed> seeds;
        for (size_t i = 0; i < count; ++i) {
            seeds.push_back({words[3 * i] | uint64_t{words[3 * i + 1]} << 32, words[3 * i + 2]});
        }
        size_t const size = static_cast<size_t>(num_steps) * count * static_cast<size_t>(codes) * 4;
        ssd_runtime::fill_noise(seeds, static_cast<size_t>(codes), first_step, num_steps,
                                reinterpret_cast<float*>(fake::memory(noise, size)));
    });
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuStreamCreate(CUstream* stream, unsigned) {
    CALL(true)
    *stream = new_handle<CUstream>();
    device().queued[*stream];
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuStreamDestroy(CUstream stream) {
    CALL(true)
    if (device().made_on[stream] > 0) {
        fake::die("what runs on a stream is alive when it goes");
    }
    if (!device().queued.at(stream).empty()) {
        fake::die("work is left on a stream that goes");
    }
    device().queued.erase(stream);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuStreamSynchronize(CUstream stream) {
    CALL(true)
    run(stream);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    CALL(true)
    if (mode != CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) {
        fake::die("a capture that other threads disturb");
    }
    device().captured[stream];
    ++captures_here;
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
    CALL(true, true)
    *graph = new_handle<CUgraph>();
    device().graphs[*graph] = device().captured.at(stream);
    device().captured.erase(stream);
    --captures_here;
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph,
                                            unsigned long long) {
    CALL(true)
    *executable = new_handle<CUgraphExec>();
    device().graphs[*executable] = device().graphs.at(graph);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    CALL(true)
    for (Work const& work : device().graphs.at(executable)) {
        fake::queue(stream, work);
    }
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuGraphDestroy(CUgraph graph) {
    CALL(true)
    device().graphs.erase(graph);
    return CUDA_SUCCESS;
}
PUBLIC CUresult cuGraphExecDestroy(CUgraphExec executable) {
    CALL(true)
    device().graphs.erase(executable);
    return CUDA_SUCCESS;
}
