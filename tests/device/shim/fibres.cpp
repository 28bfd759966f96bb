#include "fibres.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {
namespace {

constexpr int kWarpSize = 32;
constexpr std::size_t kStackBytes = 128 * 1024;

// Address sanitizer must be told of every change of stack.
#if defined(__SANITIZE_ADDRESS__)
void start_switch(void** fake_stack, const void* bottom, std::size_t size) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
}
void finish_switch(void* fake_stack, const void** bottom, std::size_t* size) {
  __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
}
void make_stack_clean(void* stack) { __asan_unpoison_memory_region(stack, kStackBytes); }
#else
void start_switch(void**, const void*, std::size_t) {}
void finish_switch(void*, const void**, std::size_t*) {}
void make_stack_clean(void*) {}
#endif

enum class State { ready, waiting, done };

struct Barrier {
  const char* kind;
  int expected;
  int arrived = 0;
  Where where{};
};

struct Warp {
  Barrier barrier{"warp barrier", kWarpSize};
  std::uint64_t values[2][kWarpSize] = {};
  int turn[kWarpSize] = {};  // which of the two sets a lane writes next
};

struct Block {
  Barrier barrier{"block barrier", 0};
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
};

struct Fibre {
  ucontext_t context{};
  void* stack = nullptr;
  void* fake_stack = nullptr;
  State state = State::ready;
  int block = 0, thread = 0;
  const Barrier* waits_at = nullptr;
};

struct Grid {
  Launch launch;
  const std::function<void()>* kernel = nullptr;
  std::vector<Block> blocks;
  std::vector<Fibre> fibres;
  Barrier barrier{"grid barrier", 0};
  ucontext_t scheduler{};
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  std::string error;
};

Grid* grid = nullptr;
Fibre* current = nullptr;

std::vector<void*>& spare_stacks() {
  static std::vector<void*> stacks;
  return stacks;
}

void* take_stack() {
  auto& spare = spare_stacks();
  if (!spare.empty()) {
    void* stack = spare.back();
    spare.pop_back();
    make_stack_clean(stack);
    return stack;
  }
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::runtime_error("no memory for a fibre's stack");
  return stack;
}

std::string place(const Where& where) {
  std::string file = where.file_name();
  file = file.substr(file.rfind('/') + 1);
  return file + ":" + std::to_string(where.line()) + " (" + where.function_name() + ")";
}

void back_to_scheduler() {
  Fibre* self = current;
  start_switch(self->state == State::done ? nullptr : &self->fake_stack, grid->scheduler_stack,
               grid->scheduler_stack_size);
  swapcontext(&self->context, &grid->scheduler);
  finish_switch(self->fake_stack, &grid->scheduler_stack, &grid->scheduler_stack_size);
}

void enter() {
  finish_switch(nullptr, &grid->scheduler_stack, &grid->scheduler_stack_size);
  (*grid->kernel)();
  current->state = State::done;
  back_to_scheduler();
  std::abort();  // a finished fibre is never resumed
}

void resume(Fibre& fibre) {
  current = &fibre;
  start_switch(&grid->scheduler_fake_stack, fibre.stack, kStackBytes);
  swapcontext(&grid->scheduler, &fibre.context);
  finish_switch(grid->scheduler_fake_stack, nullptr, nullptr);
  current = nullptr;
}

void set_error(const std::string& message) { grid->error = message; }

// The launch is over. The fibre keeps nothing that would have to be destroyed.
[[noreturn]] void abandon() {
  back_to_scheduler();
  std::abort();
}

void wait(Barrier& barrier, const Where& where) {
  if (barrier.arrived == 0) {
    barrier.where = where;
  } else if (barrier.where.line() != where.line() ||
             std::strcmp(barrier.where.function_name(), where.function_name()) != 0) {
    set_error(std::string("threads at different places of one ") + barrier.kind + ": " + place(barrier.where) +
              " and " + place(where));
    abandon();
  }
  if (++barrier.arrived < barrier.expected) {
    current->state = State::waiting;
    current->waits_at = &barrier;
    back_to_scheduler();
    return;
  }
  barrier.arrived = 0;
  for (Fibre& fibre : grid->fibres) {
    if (fibre.state == State::waiting && fibre.waits_at == &barrier) fibre.state = State::ready;
  }
}

void start(Fibre& fibre, int block, int thread) {
  fibre.block = block;
  fibre.thread = thread;
  fibre.stack = take_stack();
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack;
  fibre.context.uc_stack.ss_size = kStackBytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, enter, 0);
}

std::string describe_deadlock() {
  int done = 0;
  std::string waiting;
  const Barrier* described = nullptr;
  for (const Fibre& fibre : grid->fibres) {
    if (fibre.state == State::done) ++done;
    if (fibre.state != State::waiting || fibre.waits_at == described) continue;
    described = fibre.waits_at;
    waiting += std::string(waiting.empty() ? "" : "; ") + std::to_string(described->arrived) + " of " +
               std::to_string(described->expected) + " threads at the " + described->kind + " in " +
               place(described->where);
  }
  return "threads diverged at a barrier: " + waiting + "; " + std::to_string(done) + " threads have left the kernel";
}

// Runs the fibres in rounds until all are done.
void run_fibres(std::mt19937& random) {
  std::vector<Fibre*> ready;
  for (;;) {
    ready.clear();
    bool all_done = true;
    for (Fibre& fibre : grid->fibres) {
      all_done = all_done && fibre.state == State::done;
      if (fibre.state == State::ready) ready.push_back(&fibre);
    }
    if (all_done) return;
    if (ready.empty()) throw std::runtime_error(describe_deadlock());
    if (grid->launch.order.kind == Order::descending) std::reverse(ready.begin(), ready.end());
    if (grid->launch.order.kind == Order::shuffled) std::shuffle(ready.begin(), ready.end(), random);
    for (Fibre* fibre : ready) {
      resume(*fibre);
      if (!grid->error.empty()) throw std::runtime_error(grid->error);
    }
  }
}

// The blocks [first, last) together.
void run_blocks(const Launch& launch, const std::function<void()>& kernel, const std::vector<int>& which,
                std::mt19937& random) {
  Grid own;
  own.launch = launch;
  own.kernel = &kernel;
  own.barrier.expected = launch.blocks * launch.threads;
  own.blocks.resize(launch.blocks);
  own.fibres.resize(which.size() * launch.threads);
  // Exactly as large as asked for, so that address sanitizer sees what goes beyond.
  std::vector<std::unique_ptr<unsigned char, decltype(&std::free)>> shared;
  grid = &own;
  std::size_t next = 0;
  for (const int block : which) {
    own.blocks[block].barrier.expected = launch.threads;
    own.blocks[block].warps.resize((launch.threads + kWarpSize - 1) / kWarpSize);
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, std::max<std::size_t>(launch.shared_bytes, 1)) != 0) throw std::bad_alloc();
    std::fill_n(static_cast<unsigned char*>(memory), launch.shared_bytes, 0xCD);
    shared.emplace_back(static_cast<unsigned char*>(memory), &std::free);
    own.blocks[block].shared = shared.back().get();
    for (int thread = 0; thread < launch.threads; ++thread) start(own.fibres[next++], block, thread);
  }
  const auto give_back = [&own] {
    for (Fibre& fibre : own.fibres) spare_stacks().push_back(fibre.stack);
    grid = nullptr;
    current = nullptr;
  };
  try {
    run_fibres(random);
  } catch (...) {
    give_back();
    throw;
  }
  give_back();
}

}  // namespace

void run_grid(const Launch& launch, const std::function<void()>& kernel) {
  if (launch.threads % kWarpSize != 0) throw std::runtime_error("a block must be made of whole warps");
  std::mt19937 random(launch.order.seed);
  std::vector<int> blocks(launch.blocks);
  for (int b = 0; b < launch.blocks; ++b) blocks[b] = b;
  if (launch.cooperative) return run_blocks(launch, kernel, blocks, random);
  if (launch.order.kind == Order::descending) std::reverse(blocks.begin(), blocks.end());
  if (launch.order.kind == Order::shuffled) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const int block : blocks) run_blocks(launch, kernel, {block}, random);
}

int thread_index() { return current->thread; }
int block_index() { return current->block; }
int block_count() { return grid->launch.blocks; }
unsigned char* shared_memory() { return grid->blocks[current->block].shared; }

void warp_barrier(const Where& where) {
  wait(grid->blocks[current->block].warps[current->thread / kWarpSize].barrier, where);
}

void block_barrier(const Where& where) { wait(grid->blocks[current->block].barrier, where); }

void grid_barrier(const Where& where) {
  if (!grid->launch.cooperative) fail("grid barrier in a launch that is not cooperative", where);
  wait(grid->barrier, where);
}

std::uint64_t exchange(std::uint64_t value, int lane_mask, const Where& where) {
  Warp& warp = grid->blocks[current->block].warps[current->thread / kWarpSize];
  const int lane = current->thread % kWarpSize;
  // Two sets of values in turn: a lane that is early at the next exchange does not overwrite what others still read.
  const int turn = warp.turn[lane];
  warp.turn[lane] = 1 - turn;
  warp.values[turn][lane] = value;
  wait(warp.barrier, where);
  return warp.values[turn][lane ^ lane_mask];
}

void yield() { back_to_scheduler(); }

void fail(const char* message, const Where& where) {
  set_error(std::string(message) + " in " + place(where));
  abandon();
}

}  // namespace shim
