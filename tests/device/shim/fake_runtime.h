// The device that the fake runtime pretends to have, for tests to choose.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "cuda_runtime_api.h"
#include "fibres.h"

namespace shim {

struct Device {
  int multiprocessors = 2;
  int blocks_per_multiprocessor = 2;  // as registers allow; shared memory may allow fewer
  int shared_per_block = 99 * 1024;
  int shared_per_multiprocessor = 100 * 1024;
  int shared_reserved = 1024;
  int driver = 13000;
  bool cooperative = true;
  bool out_of_memory = false;
  bool refuse_cooperative = false;  // the attribute says yes, the launch says no
  Order order;
};

Device& device();
int launches();                 // of kernels, so far
std::string take_last_error();  // what went wrong in a kernel, in words

// A kernel is known by its address; `invoke` calls it with its argument.
const void* register_kernel(const void* address, std::size_t argument_bytes, std::function<void(const void*)> invoke);

}  // namespace shim
