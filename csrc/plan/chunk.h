// The plan: which span of which tensor is one piece of work.
//
// Tensors are cut into chunks of a fixed size, whatever the number of workers, and the partial norm of each chunk is
// combined in the order of this table: that is why a norm is the same bit for bit on one thread and on many. The
// table depends on nothing but the tensors' sizes, so it is made once and used at every step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gradfast {

struct Chunk {
  std::int32_t tensor;  // index into the list of tensors
  std::int32_t length;  // in elements, at least 1
  std::int64_t offset;  // of the first element, in elements
};

// A worker takes one task at a time: a run of whole chunks, so that many small tensors cost one hand-out.
struct Task {
  std::int32_t first_chunk;
  std::int32_t last_chunk;  // one past the end
};

struct Plan {
  std::vector<Chunk> chunks;
  std::vector<Task> tasks;
  std::int64_t elements = 0;
};

// Cuts tensors of `sizes[i]` elements into chunks of at most `chunk_elements` and bins neighbouring chunks into tasks
// of at least `task_elements` (but for the last). Empty tensors get no chunk.
inline Plan make_plan(const std::vector<std::int64_t>& sizes, std::int64_t chunk_elements, std::int64_t task_elements) {
  Plan plan;
  std::int64_t binned = 0;
  std::int32_t first_chunk = 0;
  const auto close_task = [&] {
    const auto end = static_cast<std::int32_t>(plan.chunks.size());
    if (end > first_chunk) plan.tasks.push_back({first_chunk, end});
    first_chunk = end;
    binned = 0;
  };
  for (std::size_t tensor = 0; tensor < sizes.size(); ++tensor) {
    for (std::int64_t offset = 0; offset < sizes[tensor]; offset += chunk_elements) {
      const std::int64_t length = std::min(chunk_elements, sizes[tensor] - offset);
      plan.chunks.push_back({static_cast<std::int32_t>(tensor), static_cast<std::int32_t>(length), offset});
      plan.elements += length;
      binned += length;
      if (binned >= task_elements) close_task();
    }
  }
  close_task();
  return plan;
}

}  // namespace gradfast
