#include "binding/backend_pool.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <mutex>
#include <unordered_map>
#include <vector>

namespace gradfast {
namespace {

struct Pool {
  std::mutex mutex;
  std::unordered_map<c10::Stream, std::vector<std::unique_ptr<Backend>>> idle;
};

// Never destroyed: at exit the CUDA runtime may be gone before a static's destructor runs.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

BackendLease::BackendLease(at::Device device) : stream_(c10::impl::VirtualGuardImpl(device.type()).getStream(device)) {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    auto& idle = pool().idle[stream_];
    if (!idle.empty()) {
      backend_ = std::move(idle.back());
      idle.pop_back();
    }
  }
  if (!backend_) backend_ = make_backend(device);
}

BackendLease::~BackendLease() {
  if (!backend_) return;
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().idle[stream_].push_back(std::move(backend_));
}

}  // namespace gradfast
