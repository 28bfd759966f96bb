#include "fake_runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

struct CUgraph_st {
  std::vector<std::function<void()>> nodes;
};

struct CUstream_st {
  std::deque<std::function<void()>> queue;
  std::unique_ptr<CUgraph_st> capture;  // of the graph that is being captured
};

struct CUevent_st {
  int pending = 0;  // records that were enqueued and have not happened
};

namespace shim {
namespace {

struct KernelRecord {
  std::size_t argument_bytes;
  std::function<void(const void*)> invoke;
  int shared_limit = 48 * 1024;  // until the attribute raises it
};

std::map<const void*, KernelRecord>& kernels() {
  static std::map<const void*, KernelRecord> all;
  return all;
}

CUstream_st default_stream;
std::set<CUstream_st*> streams{&default_stream};
std::map<const unsigned char*, std::size_t> pinned;  // address to size
std::string last_error;
cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
int captures = 0;
int launch_count = 0;

CUstream_st& stream_of(cudaStream_t stream) { return stream ? *stream : default_stream; }

void enqueue(cudaStream_t stream, std::function<void()> work) {
  CUstream_st& s = stream_of(stream);
  if (s.capture) {
    s.capture->nodes.push_back(std::move(work));
  } else {
    s.queue.push_back(std::move(work));
  }
}

cudaError_t drain(CUstream_st& stream) {
  while (!stream.queue.empty()) {
    const auto work = std::move(stream.queue.front());
    stream.queue.pop_front();
    try {
      work();
    } catch (const std::exception& error) {
      last_error = error.what();
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

cudaError_t drain_all() {
  for (CUstream_st* stream : streams) {
    if (const cudaError_t error = drain(*stream)) return error;
  }
  return cudaSuccess;
}

// What CUDA refuses while any stream is being captured, unless the thread said that it may.
bool refused() { return captures > 0 && thread_mode != cudaStreamCaptureModeRelaxed; }

bool is_pinned(const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  auto after = pinned.upper_bound(byte);
  return after != pinned.begin() && byte < std::prev(after)->first + std::prev(after)->second;
}

cudaError_t enqueue_kernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments, std::size_t shared_bytes,
                           cudaStream_t stream, bool cooperative) {
  const auto known = kernels().find(kernel);
  if (known == kernels().end()) return cudaErrorInvalidValue;
  const KernelRecord& record = known->second;
  if (static_cast<int>(shared_bytes) > record.shared_limit) return cudaErrorInvalidValue;
  if (record.argument_bytes > 4096 && device().driver < 12010) return cudaErrorInvalidValue;
  const auto* bytes = static_cast<const unsigned char*>(arguments[0]);
  // Aligned as an argument is.
  std::shared_ptr<void> copy(std::aligned_alloc(16, (record.argument_bytes + 15) / 16 * 16), &std::free);
  std::memcpy(copy.get(), bytes, record.argument_bytes);
  Launch launch{static_cast<int>(blocks.x), static_cast<int>(threads.x), shared_bytes, cooperative, device().order};
  enqueue(stream, [launch, copy, invoke = record.invoke] {
    ++launch_count;
    run_grid(launch, [&] { invoke(copy.get()); });
  });
  return cudaSuccess;
}

}  // namespace

Device& device() {
  static Device device;
  return device;
}

int launches() { return launch_count; }

std::string take_last_error() { return std::exchange(last_error, {}); }

const void* register_kernel(const void* address, std::size_t argument_bytes, std::function<void(const void*)> invoke) {
  kernels().try_emplace(address, KernelRecord{argument_bytes, std::move(invoke)});
  return address;
}

}  // namespace shim

using namespace shim;

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure && !last_error.empty() ? last_error.c_str() : cudaGetErrorName(error);
}

const char* cudaGetErrorName(cudaError_t error) {
  static const char* const names[] = {"cudaSuccess",
                                      "cudaErrorInvalidValue",
                                      "cudaErrorMemoryAllocation",
                                      "cudaErrorNotReady",
                                      "cudaErrorLaunchFailure",
                                      "cudaErrorLaunchOutOfResources",
                                      "cudaErrorCooperativeLaunchTooLarge",
                                      "cudaErrorStreamCaptureUnsupported"};
  return names[error];
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = device().driver;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device().multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device().shared_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device().shared_per_multiprocessor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = device().shared_reserved;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = device().cooperative ? 1 : 0;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return refused() ? cudaErrorStreamCaptureUnsupported : drain_all(); }

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  if (device().out_of_memory) return cudaErrorMemoryAllocation;
  // To the byte, so that address sanitizer sees what goes beyond; filled, so that nobody relies on zeros.
  if (posix_memalign(address, 256, bytes ? bytes : 1) != 0) return cudaErrorMemoryAllocation;
  std::memset(*address, 0xCD, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  drain_all();
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, std::size_t bytes, unsigned) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  *address = std::malloc(bytes);
  pinned[static_cast<unsigned char*>(*address)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
  drain_all();
  pinned.erase(static_cast<unsigned char*>(address));
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  if (const cudaError_t error = drain_all()) return error;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (is_pinned(from)) {  // read when the copy happens
    enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  } else {  // CUDA has read it by the time it returns
    std::vector<unsigned char> staged(static_cast<const unsigned char*>(from),
                                      static_cast<const unsigned char*>(from) + bytes);
    enqueue(stream, [to, staged] { std::memcpy(to, staged.data(), staged.size()); });
  }
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const cudaError_t error = drain(*stream);
  streams.erase(stream);
  delete stream;
  return error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (refused() || stream_of(stream).capture) return cudaErrorStreamCaptureUnsupported;
  return drain(stream_of(stream));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  drain_all();
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (stream_of(stream).capture) return cudaErrorStreamCaptureUnsupported;  // not what we want to do
  ++event->pending;
  enqueue(stream, [event] { --event->pending; });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  return event->pending > 0 ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream_of(stream).capture = std::make_unique<CUgraph_st>();
  ++captures;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream_of(stream).capture.release();
  --captures;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream_of(stream).capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraph_st(*graph);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  for (const auto& node : executable->nodes) enqueue(stream, node);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const auto known = kernels().find(kernel);
  if (known == kernels().end()) return cudaErrorInvalidValue;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > device().shared_per_block) return cudaErrorInvalidValue;
    known->second.shared_limit = value;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int,
                                                          std::size_t shared_bytes) {
  if (!kernels().count(kernel)) return cudaErrorInvalidValue;
  const int each = static_cast<int>(shared_bytes) + device().shared_reserved;
  *blocks = std::min(device().blocks_per_multiprocessor, device().shared_per_multiprocessor / each);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments, std::size_t shared_bytes,
                             cudaStream_t stream) {
  return enqueue_kernel(kernel, blocks, threads, arguments, shared_bytes, stream, false);
}

cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments,
                                        std::size_t shared_bytes, cudaStream_t stream) {
  int resident = 0;
  if (const auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 0, shared_bytes)) {
    return error;
  }
  if (device().refuse_cooperative || static_cast<int>(blocks.x) > resident * device().multiprocessors) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return enqueue_kernel(kernel, blocks, threads, arguments, shared_bytes, stream, true);
}
