#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace ssd_runtime {

using DeviceAddress = unsigned long long;  // CUdeviceptr
using CudaStream = void*;                  // CUstream, cudaStream_t

constexpr size_t device_alignment = 256;  // of every buffer: what TensorRT asks of inputs

struct CudaCalls;

// The primary context of a GPU, which TensorRT uses too, and its memory. Any thread may call: each
// call first makes the context current there.
class CudaDevice {
public:
    // Throws Failure for a number that no GPU of this machine has.
    explicit CudaDevice(int number);
    CudaDevice(CudaDevice const&) = delete;
    CudaDevice& operator=(CudaDevice const&) = delete;
    ~CudaDevice();

    void use() const;
    void try_use() const noexcept;       // for destructors
    int64_t compute_capability() const;  // times ten
    uint64_t free_bytes() const;
    // Throws Failure SSD_OUT_OF_MEMORY where the driver has no more, whatever it said before.
    DeviceAddress allocate(size_t num_bytes) const;
    void free(DeviceAddress address) const noexcept;
    CudaCalls const& calls() const { return calls_; }
    // Throws Failure SSD_INTERNAL_ERROR for a call that failed.
    void check(int result, char const* call) const;

private:
    CudaCalls const& calls_;
    int device_ = 0;
    void* context_ = nullptr;
};

// Device memory that is freed when it goes.
class DeviceMemory {
public:
    DeviceMemory(CudaDevice const& device, size_t num_bytes)
        : device_(device), address_(device.allocate(num_bytes)) {}
    DeviceMemory(DeviceMemory const&) = delete;
    DeviceMemory& operator=(DeviceMemory const&) = delete;
    ~DeviceMemory() { device_.free(address_); }

    DeviceAddress address() const { return address_; }

private:
    CudaDevice const& device_;
    DeviceAddress address_;
};

// One stream: all is queued in the order of the calls; synchronize and download wait.
class DeviceQueue {
public:
    explicit DeviceQueue(CudaDevice const& device);
    DeviceQueue(DeviceQueue const&) = delete;
    DeviceQueue& operator=(DeviceQueue const&) = delete;
    ~DeviceQueue();

    CudaDevice const& device() const { return device_; }
    CudaStream stream() const { return stream_; }

    // The source must stay until the next wait.
    void upload(DeviceAddress target, void const* source, size_t num_bytes);
    // Keeps a copy of the numbers until the next wait.
    template <typename Item>
    void upload(DeviceAddress target, std::vector<Item> const& items) {
        auto const* bytes = reinterpret_cast<std::byte const*>(items.data());
        sources_.emplace_back(bytes, bytes + items.size() * sizeof(Item));
        upload(target, sources_.back().data(), sources_.back().size());
    }
    // The target is written by the next wait.
    void queue_download(void* target, DeviceAddress source, size_t num_bytes);
    void download(void* target, DeviceAddress source, size_t num_bytes);
    void fill(DeviceAddress target, unsigned char byte, size_t num_bytes);
    void copy(DeviceAddress target, DeviceAddress source, size_t num_bytes);
    // The first `width` bytes of rows that are `pitch` bytes apart.
    struct Rows {
        DeviceAddress address;
        size_t pitch;
    };
    void copy_rows(Rows target, Rows source, size_t width, size_t count);
    void synchronize();
    void try_synchronize() noexcept;  // for destructors

    // Work that was captured once; nothing is executed by the capture. Destroyed after a wait.
    class Graph {
    public:
        Graph(DeviceQueue& queue, std::function<void()> const& work);
        Graph(Graph const&) = delete;
        Graph& operator=(Graph const&) = delete;
        ~Graph();
        void launch();

    private:
        DeviceQueue& queue_;
        void* executable_ = nullptr;
    };

private:
    CudaDevice const& device_;
    CudaStream stream_ = nullptr;
    std::vector<std::vector<std::byte>> sources_;  // what the stream may still read
};

// A kernel of PTX, which the driver compiles for the GPU.
class DeviceKernel {
public:
    // image: PTX, ends with a zero byte.
    DeviceKernel(CudaDevice const& device, char const* image, char const* entry);
    DeviceKernel(DeviceKernel const&) = delete;
    DeviceKernel& operator=(DeviceKernel const&) = delete;
    ~DeviceKernel();

    // Queues a grid of blocks of num_threads.
    void launch(DeviceQueue& queue, unsigned grid_x, unsigned grid_y, unsigned num_threads,
                void** arguments);

private:
    CudaDevice const& device_;
    void* module_ = nullptr;
    void* function_ = nullptr;
};

}  // namespace ssd_runtime
