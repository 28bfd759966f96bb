// That the simulator sees the faults that it is there to see: each kernel here has one.
#include <cstdint>
#include <string>
#include <vector>

#include "cases.h"
#include "check.h"
#include "cuda/intrinsics.cuh"
#include "devices.h"

namespace test {
namespace {

using namespace gradfast::cuda;

constexpr int kBlockThreads = 64;

std::string error_of(const std::function<void()>& kernel, int blocks = 2, bool cooperative = true) {
  return thrown_by([&] { shim::run_grid({blocks, kBlockThreads, 1024, cooperative, {}}, kernel); });
}

bool says(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

// Each thread takes over its neighbour's number, with or without the barrier that this needs.
std::vector<int> neighbours(bool with_barrier, shim::Order order) {
  std::vector<int> result(kBlockThreads, -1);
  shim::run_grid({1, kBlockThreads, kBlockThreads * sizeof(int), false, order}, [&] {
    int* numbers = reinterpret_cast<int*>(shared_memory());
    numbers[thread_index()] = thread_index();
    if (with_barrier) block_barrier();
    result[thread_index()] = numbers[(thread_index() + 1) % kBlockThreads];
  });
  return result;
}

void missing_barrier() {
  std::vector<int> right;
  for (int t = 0; t < kBlockThreads; ++t) right.push_back((t + 1) % kBlockThreads);
  int seen = 0;
  for (std::uint32_t seed = 1; seed <= 4; ++seed) {
    const shim::Order order{shim::Order::shuffled, seed};
    check(neighbours(true, order) == right, "right with the barrier");
    seen += neighbours(false, order) != right;
  }
  check(seen == 4, "wrong without it, in every order");
}

void divergence() {
  const std::string left = error_of([] {
    if (thread_index() == 5) return;
    block_barrier();
  });
  check(says(left, "diverged") && says(left, "63 of 64 threads at the block barrier"), left);
  check(says(left, "2 threads have left"), left);

  const std::string kinds = error_of([] {
    if (block_index() == 0) {
      block_barrier();
    } else if (thread_index() % 2) {
      grid_barrier();
    } else {
      block_barrier();
    }
  });
  check(says(kinds, "diverged") && says(kinds, "grid barrier") && says(kinds, "32 of 64"), kinds);

  const std::string places = error_of([] {
    if (thread_index() < 10) {
      block_barrier();
    } else {
      block_barrier();
    }
  });
  check(says(places, "different places of one block barrier"), places);

  const std::string lanes = error_of([] {
    if (thread_index() % 32 < 16) shuffle_xor(1.0, 1);
  });
  check(says(lanes, "16 of 32 threads at the warp barrier"), lanes);

  const std::string blocks = error_of(
      [] {
        if (block_index() != 1) grid_barrier();
      },
      3);
  check(says(blocks, "128 of 192 threads at the grid barrier"), blocks);
}

void misuse() {
  check(says(error_of([] { grid_barrier(); }, 2, false), "not cooperative"), "grid barrier needs cooperation");
  const std::string misaligned = error_of([] { load_bits(shared_memory() + 4); });
  check(says(misaligned, "misaligned 16-byte load"), misaligned);
}

// What works: sums by shuffles, counters, a value that crosses the grid.
void barriers_hold() {
  for (std::uint32_t seed = 1; seed <= 3; ++seed) {
    std::uint32_t counter = 0, last = 0;
    std::vector<double> sums(3);
    bool right = true;
    shim::run_grid({3, kBlockThreads, 16, true, {shim::Order::shuffled, seed}}, [&] {
      double sum = thread_index();
      for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      right = right && sum == (warp_index() == 0 ? 496 : 1520);
      if (thread_index() == 0) sums[block_index()] = block_index() + 1;
      grid_barrier();
      right = right && sums[0] + sums[1] + sums[2] == 6;
      if (count_up(&counter) + 1 == 3u * kBlockThreads) ++last;
    });
    check(right && counter == 3u * kBlockThreads && last == 1, "barriers, shuffles and counters");
  }
}

// The runtime does nothing before it must, so that a buffer overwritten too early is seen.
void runtime_is_late() {
  void *device = nullptr, *pinned = nullptr;
  cudaStream_t stream;
  cudaEvent_t event;
  check(cudaMalloc(&device, 4) == cudaSuccess && cudaHostAlloc(&pinned, 4, 0) == cudaSuccess, "allocates");
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "makes a stream");
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess, "makes an event");
  *static_cast<int*>(pinned) = 1;
  cudaMemcpyAsync(device, pinned, 4, cudaMemcpyHostToDevice, stream);
  cudaEventRecord(event, stream);
  check(cudaEventQuery(event) == cudaErrorNotReady, "not yet copied");
  *static_cast<int*>(pinned) = 2;
  cudaStreamSynchronize(stream);
  check(cudaEventQuery(event) == cudaSuccess, "copied");
  int got = 0;
  cudaMemcpy(&got, device, 4, cudaMemcpyDeviceToHost);
  check(got == 2, "the copy read what was written after it was asked for");
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  void* refused = nullptr;
  check(cudaMalloc(&refused, 4) == cudaErrorStreamCaptureUnsupported, "no allocation during a capture");
  cudaGraph_t graph;
  cudaStreamEndCapture(stream, &graph);
  cudaGraphDestroy(graph);
  cudaEventDestroy(event);
  cudaStreamDestroy(stream);
  cudaFreeHost(pinned);
  cudaFree(device);
}

}  // namespace

void run_shim_cases() {
  run_case("simulator: a missing barrier shows", missing_barrier);
  run_case("simulator: divergence is an error", divergence);
  run_case("simulator: misuse is an error", misuse);
  run_case("simulator: barriers hold", barriers_hold);
  run_case("simulator: copies are late", runtime_is_late);
}

}  // namespace test
