// What a backend is asked to do: one step over a list of tensors. No torch in here: plain addresses and numbers, which
// the binding fills in and the CPU and CUDA backends read.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "plan/layout.h"
#include "rules/clip.h"
#include "rules/norm.h"
#include "rules/rounding.h"
#include "rules/rules.h"

namespace gradfast {

enum class DType : int { float64, float32, float16, bfloat16 };

inline constexpr int kParameter = 0;  // places in Slot::arrays
inline constexpr int kGradient = 1;
inline constexpr int kFirstState = 2;

// The formats of a tensor's arrays where they are not all the same (mixed precision). Where the parameter that the rule
// works on is an fp32 master, the array behind the last state is the parameter that the model sees: never read, and
// written with the master rounded to nearest.
struct Formats {
  Format array[kMaxArrays] = {};
  bool has_copy = false;

  bool operator==(const Formats&) const = default;
};

// One tensor with everything that a rule reads or writes for it.
struct Slot {
  void* arrays[kMaxArrays] = {};  // parameter, gradient, states, copy of a master; first element of each
  float* step = nullptr;          // number of updates so far, on the tensor's device; counted up unless skipped
  std::int64_t elements = 0;      // real numbers: a complex tensor counts two an element
  std::int64_t row_length = 0;    // elements of a unit, see plan/units.h; 0: ClipSettings::units leaves it alone
  std::int32_t weights = 0;       // the array that holds the units' weights: the parameter, or a master of it
  std::int32_t group = 0;         // index into Problem::groups
  std::int32_t layout = -1;       // index into Problem::layouts; -1: dense, memory order serves for all arrays
  DType dtype = DType::float32;   // of all arrays; where they are mixed, of the gradient
  bool mixed = false;             // the arrays have the formats below, or are rounded by chance; all below fp64
  Formats formats;
  std::uint32_t number = 0;  // of the parameter in its optimiser: its random bits are drawn by it
};

// One parameter group: which rule, and its scalars.
struct Group {
  int rule = -1;                   // index into Rules; -1: measure only
  PackedHyperparameters values{};  // value[0] is the learning rate
  const void* lr = nullptr;        // CUDA only: the learning rate in device memory, replaces value[0]
  bool lr_is_double = false;
  double max_norm = INFINITY;  // of the gradients of this group alone, after all other clipping
};

struct Problem {
  std::vector<Slot> slots;
  std::vector<Layout> layouts;
  std::vector<Group> groups;
  Norm norm;
  ClipSettings clip;
  const float* loss_scale = nullptr;      // mixed precision: the gradients in memory carry this factor
  const float* found_infinite = nullptr;  // mixed precision: nonzero asks to skip
  std::uint64_t rounding_seed = 0;        // of all rounding by chance

  // Sums of powers by Slot::number, for policies that clip each tensor by itself; null: this device's own. Whoever
  // holds only a part of each parameter brings those of the whole, in the memory of the device.
  const double* parameter_sums = nullptr;

  // Update clipping: a factor on each tensor's learning rate, which the step finds by the rule's squared_update.
  bool clips_updates = false;

  // The means of squared updates by Slot::number, likewise of whole parameters; null: the step finds its own.
  const double* update_means = nullptr;
};

inline bool has_group_limits(const Problem& problem) {
  for (const Group& group : problem.groups) {
    if (group.max_norm != INFINITY) return true;
  }
  return false;
}

// What the gradients in memory carry; for a Problem whose addresses the host can read.
inline double loss_scale_of(const Problem& problem) {
  return problem.loss_scale == nullptr ? 1.0 : *problem.loss_scale;
}

// True where the size of an update depends on the norm. Then it is not measured beside that, but in a phase of its own
// between decision and update, which reads gradients and second moments once more: 8 bytes a parameter in fp32.
inline bool measures_updates_apart(const Problem& problem) {
  return problem.clips_updates &&
         (problem.clip.max_norm != INFINITY || problem.clip.policies.count > 0 || has_group_limits(problem));
}

// True where tensors of one group may need constants of their own.
inline bool differs_by_tensor(const Problem& problem) {
  return clips_each_tensor(problem.clip.policies) || problem.clips_updates || has_group_limits(problem);
}

// The random bits that serve array number `array` of a Slot: which pair of random_words, and how far up in a word.
struct RandomPlace {
  int pair, shift;

  GF_HOST_DEVICE explicit RandomPlace(int array) {
    const int place = array == kParameter ? 0 : array - kFirstState + 1;
    pair = place / 2;
    shift = place % 2 * 16;
  }
};

// Which of the two phases to run. `update` alone takes the total (a sum of powers, not yet a norm) from the caller, and
// so does `measure_updates`, for whoever joins updates measured apart with those of other processes.
enum class Phase : int { measure = 1, update = 2, both = 3, measure_updates = 4 };

// What a step leaves behind, in the memory of the device that ran it.
struct Report {
  double sum = 0;          // over all elements: sum of powers (largest magnitude for the infinity norm)
  double norm = 0;         // of the true gradients, before clipping
  double coefficient = 1;  // in [0, 1]
  double limit = 0;        // what the norm was held to; infinity where it was not
  std::int64_t skipped_steps = 0;
  std::int32_t skipped = 0;           // 1 if the last step was skipped
  std::int32_t first_nonfinite = -1;  // slot of the first tensor whose sum is not finite, when it was
  std::int32_t decider = -1;          // the clip policy that skipped or clipped, counted from 0
  float found_infinite = 0;           // 1 if the norm was not finite: a GradScaler's found_inf
};

}  // namespace gradfast
