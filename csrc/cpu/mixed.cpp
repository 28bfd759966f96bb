#include "cpu/mixed.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "cpu/convert.h"

namespace gradfast::cpu {
namespace {

constexpr std::int64_t kBlock = 512;  // elements; a multiple of four, as random words come

struct Buffers {
  alignas(64) float values[kMaxArrays][kBlock];  // of arrays that do not lie in memory as dense floats
  alignas(64) std::byte stored[kBlock * sizeof(float)];
  alignas(64) std::uint32_t random[2][kBlock + 4];  // by pair, from the first element of a quad on
};

// One block of one slot's elements.
class Block {
 public:
  Block(const Slot& slot, const Layout* layout, Buffers& buffers, std::int64_t first, std::int64_t count)
      : slot_(slot), layout_(layout), buffers_(buffers), first_(first), count_(count) {}

  // The array's elements as floats: where they are, or in a buffer.
  float* read(int array) {
    const Format format = slot_.formats.array[array];
    if (layout_ == nullptr && format == Format::float32) return static_cast<float*>(slot_.arrays[array]) + first_;
    const void* stored = layout_ == nullptr ? address(array, first_) : gather(array);
    widen_block(format, stored, buffers_.values[array], count_);
    return buffers_.values[array];
  }

  // Stores `values`, which are what read() returned, or the parameter's for the copy of a master.
  void write(int array, const float* values) {
    const Format format = slot_.formats.array[array];
    if (static_cast<const void*>(values) == address(array, first_)) return;
    const RandomPlace place(array);
    void* to = layout_ == nullptr ? address(array, first_) : buffers_.stored;
    narrow_block(format, values, to, count_, buffers_.random[place.pair] + first_ % 4, place.shift);
    if (layout_ != nullptr) scatter(array);
  }

  void draw(const RoundingKey& key, int arrays) {
    bool drawn[2] = {};
    for (int a = 0; a < arrays; ++a) {
      if (a == kGradient || !is_by_chance(slot_.formats.array[a])) continue;
      const int pair = RandomPlace(a).pair;
      const std::int64_t before = first_ % 4;
      if (!drawn[pair]) random_block(key, pair, first_ - before, count_ + before, buffers_.random[pair]);
      drawn[pair] = true;
    }
  }

 private:
  // Of element `index` of a dense array.
  std::byte* address(int array, std::int64_t index) const {
    return static_cast<std::byte*>(slot_.arrays[array]) + index * size_of(slot_.formats.array[array]);
  }

  const std::byte* gather(int array) {
    const int size = size_of(slot_.formats.array[array]);
    for (std::int64_t i = 0; i < count_; ++i) {
      std::memcpy(buffers_.stored + i * size, address(array, layout_->offset(first_ + i, array)), size);
    }
    return buffers_.stored;
  }

  void scatter(int array) {
    const int size = size_of(slot_.formats.array[array]);
    for (std::int64_t i = 0; i < count_; ++i) {
      std::memcpy(address(array, layout_->offset(first_ + i, array)), buffers_.stored + i * size, size);
    }
  }

  const Slot& slot_;
  const Layout* layout_;
  Buffers& buffers_;
  std::int64_t first_, count_;
};

}  // namespace

void update_mixed(const Slot& slot, const Layout* layout, const Chunk& chunk, const UpdateFunctions& functions,
                  const void* constants, std::uint64_t rounding_seed) {
  Buffers buffers;
  const auto updates = static_cast<std::uint32_t>(slot.step == nullptr ? 0.0f : *slot.step);
  const RoundingKey key{rounding_seed, updates, slot.number};
  for (std::int64_t done = 0; done < chunk.length; done += kBlock) {
    const std::int64_t count = std::min<std::int64_t>(kBlock, chunk.length - done);
    Block block(slot, layout, buffers, chunk.offset + done, count);
    Span span{{}, count};
    for (int a = 0; a < functions.arrays; ++a) span.arrays[a] = block.read(a);
    functions.update(constants, span);
    block.draw(key, functions.arrays);
    for (int a = 0; a < functions.arrays; ++a) {
      if (a != kGradient) block.write(a, static_cast<const float*>(span.arrays[a]));
    }
    if (slot.formats.has_copy) block.write(functions.arrays, static_cast<const float*>(span.arrays[kParameter]));
  }
}

double square_updates_mixed(const Slot& slot, const Layout* layout, const Chunk& chunk,
                            const UpdateFunctions& functions, const void* constants) {
  Buffers buffers;
  double sum = 0;
  for (std::int64_t done = 0; done < chunk.length; done += kBlock) {
    const std::int64_t count = std::min<std::int64_t>(kBlock, chunk.length - done);
    Block block(slot, layout, buffers, chunk.offset + done, count);
    Span span{{}, count};
    for (int a = kGradient; a < functions.arrays; ++a) span.arrays[a] = block.read(a);
    sum += functions.square_updates(constants, span);
  }
  return sum;
}

}  // namespace gradfast::cpu
