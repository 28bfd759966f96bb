// Runs a CUDA grid on one CPU thread: every CUDA thread is a fibre, which runs until it waits at a barrier. The order
// in which the fibres run is a choice (`Order`), so that code that relies on one order, for want of a barrier, fails in
// another. Barriers are counted: a thread that leaves while others wait for it, or waits at another barrier than they,
// ends the launch with an error that says who waited where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace shim {

using Where = std::source_location;

struct Order {
  enum Kind { ascending, descending, shuffled } kind = ascending;
  std::uint32_t seed = 1;  // of the shuffle, which differs from round to round
};

struct Launch {
  int blocks = 1;
  int threads = 1;
  std::size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks at the same time; else one after the other
  Order order;
};

// Runs `kernel` once for each thread. Throws std::runtime_error when the threads diverge at a barrier, and with what
// fail() was given.
void run_grid(const Launch& launch, const std::function<void()>& kernel);

// For the code of a kernel:
int thread_index();
int block_index();
int block_count();
unsigned char* shared_memory();
void warp_barrier(const Where& where);
void block_barrier(const Where& where);
void grid_barrier(const Where& where);
// All lanes of the warp bring 8 bytes and take those of another lane.
std::uint64_t exchange(std::uint64_t value, int lane_mask, const Where& where);
void yield();
[[noreturn]] void fail(const char* message, const Where& where);

}  // namespace shim
