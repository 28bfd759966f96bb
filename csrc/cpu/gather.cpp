#include "cpu/gather.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace gradfast::cpu {
namespace {

constexpr std::int64_t kBlock = 512;  // elements gathered at a time
constexpr int kLargestElement = 8;    // bytes

struct alignas(64) Buffer {
  std::byte bytes[kBlock * kLargestElement];
};

std::byte* address(const Slot& slot, const Layout& layout, int array, std::int64_t index, int size) {
  return static_cast<std::byte*>(slot.arrays[array]) + layout.offset(index, array) * size;
}

void gather(const Slot& slot, const Layout& layout, int array, int size, std::int64_t first, std::int64_t count,
            Buffer* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(to->bytes + i * size, address(slot, layout, array, first + i, size), size);
  }
}

void scatter(const Buffer& from, const Slot& slot, const Layout& layout, int array, std::int64_t first,
             std::int64_t count) {
  const int size = size_of(slot.dtype);
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(address(slot, layout, array, first + i, size), from.bytes + i * size, size);
  }
}

// Calls `function(first, count)` for each block of the chunk.
template <class Function>
void for_each_block(const Chunk& chunk, Function&& function) {
  for (std::int64_t done = 0; done < chunk.length; done += kBlock) {
    function(chunk.offset + done, std::min<std::int64_t>(kBlock, chunk.length - done));
  }
}

}  // namespace

double measure_gathered(const Slot& slot, const Layout& layout, int array, int size, const Chunk& chunk,
                        MeasureFunction measure, const Norm& norm, double limit) {
  Buffer buffer;
  double sum = 0;
  for_each_block(chunk, [&](std::int64_t first, std::int64_t count) {
    gather(slot, layout, array, size, first, count, &buffer);
    sum = join(norm, sum, measure(buffer.bytes, count, norm.p, limit));
  });
  return sum;
}

void update_gathered(const Slot& slot, const Layout& layout, const Chunk& chunk, const UpdateFunctions& functions,
                     const void* constants) {
  Buffer buffers[kMaxArrays];
  // Clipping works in place: parameter and gradient are one array, and what is written is the parameter's buffer.
  for_each_block(chunk, [&](std::int64_t first, std::int64_t count) {
    Span span{{}, count};
    for (int a = 0; a < functions.arrays; ++a) {
      gather(slot, layout, a, size_of(slot.dtype), first, count, &buffers[a]);
      span.arrays[a] = buffers[a].bytes;
    }
    functions.update(constants, span);
    for (int a = 0; a < functions.arrays; ++a) {
      if (a != kGradient) scatter(buffers[a], slot, layout, a, first, count);
    }
  });
}

double square_updates_gathered(const Slot& slot, const Layout& layout, const Chunk& chunk,
                               const UpdateFunctions& functions, const void* constants) {
  Buffer buffers[kMaxArrays];
  double sum = 0;
  for_each_block(chunk, [&](std::int64_t first, std::int64_t count) {
    Span span{{}, count};
    for (int a = kGradient; a < functions.arrays; ++a) {
      gather(slot, layout, a, size_of(slot.dtype), first, count, &buffers[a]);
      span.arrays[a] = buffers[a].bytes;
    }
    sum += functions.square_updates(constants, span);
  });
  return sum;
}

}  // namespace gradfast::cpu
