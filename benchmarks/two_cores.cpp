// How fast the memory is for two threads, and how far their cores are from each other.
//
//   mkdir -p build && g++ -O3 -march=native -fopenmp benchmarks/two_cores.cpp -o build/two_cores && build/two_cores
//
// A core complex has one link to the memory, which its cores share. Where a virtual machine's CPUs lie is its host's
// business, and may change from minute to minute; a cache line's way from one to the other tells. Two threads pass a
// line to and fro, then update an array in place, and read it. A pass counts where nobody took the CPU away from
// either of them; medians are printed.
#include <omp.h>
#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <vector>

namespace {

constexpr int kPasses = 40, kRoundTrips = 1000;
constexpr std::size_t kElements = 24 << 20;  // of each thread: 100 MB, beyond its caches

alignas(128) std::atomic<int> line{0};
double begin[2], end[2];
bool disturbed[2];
volatile float sink;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

long switches() {
  rusage usage;
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw + usage.ru_nivcsw;
}

void pass_line(int thread, int times) {
  for (int i = 0; i < times; ++i) {
    while (line.load(std::memory_order_acquire) != thread) {
    }
    line.store(1 - thread, std::memory_order_release);
  }
}

void update(float* array) {
  for (std::size_t i = 0; i < kElements; ++i) array[i] *= 1.0000001f;
}

// In four places at a time, as phase one of a step does.
void read(const float* array) {
  constexpr std::size_t kLanes = 16, kPart = kElements / 4;
  float sums[4][kLanes] = {};
  for (std::size_t i = 0; i < kPart; i += kLanes) {
    for (int stream = 0; stream < 4; ++stream) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) sums[stream][lane] += array[stream * kPart + i + lane];
    }
  }
  sink = sums[0][0] + sums[1][1] + sums[2][2] + sums[3][3];
}

// Both threads call it. Appends the seconds from the first one's start to the last one's end, unless disturbed.
template <class Function>
void time_pass(int thread, std::vector<double>& times, Function function) {
#pragma omp barrier
  const long before = switches();
  pass_line(thread, 10);  // they begin together
  begin[thread] = now();
  function();
  end[thread] = now();
  disturbed[thread] = switches() != before;
#pragma omp barrier
#pragma omp master
  if (!disturbed[0] && !disturbed[1]) times.push_back(std::max(end[0], end[1]) - std::min(begin[0], begin[1]));
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0.0 : values[values.size() / 2];
}

}  // namespace

int main() {
  std::vector<float> arrays[2] = {std::vector<float>(kElements, 1.0f), std::vector<float>(kElements, 1.0f)};
  std::vector<double> lines, updates, reads;
#pragma omp parallel num_threads(2)
  {
    const int thread = omp_get_thread_num();
    cpu_set_t cpu;
    CPU_ZERO(&cpu);
    CPU_SET(thread, &cpu);
    sched_setaffinity(0, sizeof cpu, &cpu);
    for (int i = 0; i < kPasses; ++i) {
      time_pass(thread, lines, [&] { pass_line(thread, kRoundTrips); });
      time_pass(thread, updates, [&] { update(arrays[thread].data()); });
      time_pass(thread, reads, [&] { read(arrays[thread].data()); });
    }
  }
  const double bytes = 2.0 * kElements * sizeof(float);
  std::printf("a line from CPU to CPU %.0f ns; in place %.0f GB/s, reading %.0f GB/s (%zu, %zu and %zu of %d passes)\n",
              median(lines) / (2.0 * kRoundTrips) * 1e9, 2 * bytes / median(updates) / 1e9, bytes / median(reads) / 1e9,
              lines.size(), updates.size(), reads.size(), kPasses);
}
