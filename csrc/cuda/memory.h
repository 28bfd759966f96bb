// Device memory that the Stepper owns, and how it is filled without waiting for the device.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace gradfast::cuda {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // errors of a call stay until they are read: not ours to leave behind
  throw std::runtime_error(std::string("gradfast: ") + call + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Makes `device` the current one for a while.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// While a stream is being captured into a graph, CUDA refuses to allocate memory, unless the thread says that it knows
// what it does. We do: what is allocated here is no part of the graph, and lives longer than it.
class AllowAllocation {
 public:
  AllowAllocation() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~AllowAllocation() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllowAllocation(const AllowAllocation&) = delete;
  AllowAllocation& operator=(const AllowAllocation&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Errors of the destructors are ignored: at the end of a process the driver may be gone already.
struct FreeDevice {
  void operator()(void* address) const { cudaFree(address); }
};
struct FreePinned {
  void operator()(void* address) const { cudaFreeHost(address); }
};

// Memory that grows. What it grew out of is kept to the end, because a kernel in flight or a graph may still use it;
// as the size doubles, that is less than the memory in use.
class DeviceMemory {
 public:
  void reserve(std::size_t bytes) {
    if (bytes > capacity_) replace(std::max(bytes, 2 * capacity_));
  }
  // Other memory, of at least as many bytes, and keeps the old.
  void replace(std::size_t bytes) {
    void* address = nullptr;
    check(cudaMalloc(&address, bytes), "cudaMalloc");
    blocks_.emplace_back(address);
    capacity_ = bytes;
  }
  std::size_t capacity() const { return capacity_; }
  template <class T = std::byte>
  T* at(std::size_t offset = 0) const {
    return blocks_.empty() ? nullptr : reinterpret_cast<T*>(static_cast<std::byte*>(blocks_.back().get()) + offset);
  }

 private:
  std::vector<std::unique_ptr<void, FreeDevice>> blocks_;
  std::size_t capacity_ = 0;
};

// Copies on a stream of its own and waits for that copy alone, whatever else the device is doing: for what is written
// once, and for what a graph under capture will need.
inline void copy_now(void* device, const void* data, std::size_t bytes) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  cudaError_t error = cudaMemcpyAsync(device, data, bytes, cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check(error, "cudaMemcpyAsync");
}

// Page-locked memory that a copy to the device reads from. It must not be written again before that copy is over.
class PinnedBuffer {
 public:
  explicit PinnedBuffer(std::size_t bytes) : capacity_(bytes) {
    void* address = nullptr;
    check(cudaHostAlloc(&address, bytes, cudaHostAllocDefault), "cudaHostAlloc");
    address_.reset(address);
    check(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }
  ~PinnedBuffer() { cudaEventDestroy(copied_); }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  bool is_free(std::size_t bytes) const {
    if (bytes > capacity_) return false;
    const cudaError_t state = cudaEventQuery(copied_);
    if (state == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    check(state, "cudaEventQuery");
    return true;
  }

  void copy_to(void* device, const void* data, std::size_t bytes, cudaStream_t stream) {
    std::memcpy(address_.get(), data, bytes);
    check(cudaMemcpyAsync(device, address_.get(), bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
    check(cudaEventRecord(copied_, stream), "cudaEventRecord");
  }

 private:
  std::unique_ptr<void, FreePinned> address_;
  std::size_t capacity_;
  cudaEvent_t copied_ = nullptr;
};

// A table in device memory that is written now and then. What is written during a capture is there at once, not by a
// copy in the graph; and what a graph may read is never written again: the next contents go elsewhere.
class DeviceTable {
 public:
  bool is_written() const { return written_; }
  void invalidate() { written_ = false; }

  // What is enqueued on `stream` afterwards finds the table written.
  void write(const void* data, std::size_t bytes, cudaStream_t stream, bool capturing) {
    written_ = false;
    if (capturing || captured_) {
      memory_.replace(std::max(bytes, memory_.capacity()));
      captured_ = false;
    }
    memory_.reserve(bytes);
    if (capturing) {
      copy_now(memory_.at(), data, bytes);
    } else {
      free_buffer(bytes).copy_to(memory_.at(), data, bytes, stream);
    }
    written_ = true;
  }

  // The address, offset by `offset` bytes, for a launch on a stream that is being captured or not.
  template <class T = std::byte>
  const T* use(bool capturing, std::size_t offset = 0) {
    captured_ = captured_ || capturing;
    return memory_.at<const T>(offset);
  }

 private:
  PinnedBuffer& free_buffer(std::size_t bytes) {
    for (const auto& buffer : buffers_) {
      if (buffer->is_free(bytes)) return *buffer;
    }
    buffers_.push_back(std::make_unique<PinnedBuffer>(memory_.capacity()));
    return *buffers_.back();
  }

  DeviceMemory memory_;
  std::vector<std::unique_ptr<PinnedBuffer>> buffers_;
  bool written_ = false;
  bool captured_ = false;
};

}  // namespace gradfast::cuda
