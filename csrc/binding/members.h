// The parameters of an optimiser with the tensors that belong to each: gradient, states, step count.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "binding/array_kind.h"
#include "binding/param_groups.h"
#include "binding/state_view.h"
#include "binding/watch.h"
#include "plan/problem.h"

namespace gradfast {

struct Member {  // one parameter
  // The tensor that the model sees.
  const at::Tensor& parameter() const { return has_master ? arrays.back() : arrays[kParameter]; }
  at::Tensor& parameter() { return has_master ? arrays.back() : arrays[kParameter]; }

  // First what each step looks at, in as few cache lines as it takes.

  at::Tensor whole;           // as the optimiser has it: a DTensor, or the same as parameter()
  Slot* slot = nullptr;       // where the engine put it; none: to be looked at in full at every step
  std::int64_t elements = 0;  // of the slot
  std::int64_t row_length = 0;
  bool active = false;  // has a gradient in this step
  bool has_master = false;
  bool sharded = false;  // a DTensor: the arrays are the parts of it that this rank holds
  bool fresh = false;    // its states were made, and no step has seen them yet
  int group;
  // As in Slot: parameter or its fp32 master, gradient of this step, states, copy.
  c10::SmallVector<at::Tensor, kMaxArrays> arrays;
  at::Tensor step;  // 0-d float: the state's own "step", or `updates`

  // What the slot relies on. Parameter and gradient have no Watch: they are looked at more closely.
  Watch step_watch, watches[kMaxArrays];
  ArrayKind kinds[kMaxArrays], step_kind;

  std::int64_t version = -1;  // of a parameter with a master, when the master was last known to agree with it
  at::Tensor updates;         // 0-d float, for rules whose state has no step count
  std::string name;
};

class Members {
 public:
  // `group_of[i]` and `names[i]` belong to `parameters[i]`.
  Members(std::vector<at::Tensor> parameters, std::vector<int> group_of, std::vector<std::string> names);

  // Takes every `.grad`, and the states where anything about them is new. Returns the indices of parameters that have a
  // gradient but no state yet. Throws if a tensor cannot be stepped.
  std::vector<int> bind(const pybind11::dict& state, const std::vector<GroupSettings>& groups);

  // The same in nanoseconds a parameter, where nothing but addresses has changed since the last bind(): writes those
  // into the members' slots, and tells autograd that the tensors are being written. Returns false where bind() has to
  // look.
  bool refresh(const pybind11::dict& state, const std::vector<GroupSettings>& groups);

  // The engine has made this slot of a member, and keeps it in place until the next bind().
  void set_slot(std::size_t member, Slot* slot);

  // Keeps this step's gradients alive, for when the Python lock is given away or the step has a second half.
  void hold_gradients();

  // After a step: tells autograd what was written, where refresh() has not, and lets go of the gradients, which are not
  // ours to keep alive.
  void finish_step();

  // The caller has just made the states of these parameters: their next update is their first.
  void mark_fresh(const std::vector<int>& parameters);
  // Others were loaded in place of states that the caller made.
  void forget_fresh();
  // Parameters with a state that no step has changed yet.
  std::vector<int> never_updated() const;

  // fp64 if a parameter is, else fp32: what norms are returned in.
  at::ScalarType norm_dtype() const;

  std::size_t size() const { return members_.size(); }
  const Member& operator[](std::size_t index) const { return members_[index]; }

 private:
  bool same_rules(const std::vector<GroupSettings>& groups) const;
  static bool refresh_member(Member& member, const at::Tensor& gradient);
  bool take_gradients();
  static at::Tensor take_parts(Member* member, const at::Tensor& gradient, bool* differs);
  std::vector<int> bind_states(const pybind11::dict& state, const std::vector<GroupSettings>& groups);
  bool bind_member(Member& member, PyObject* entries, const GroupSettings& settings);

  std::vector<Member> members_;
  std::vector<std::string> bound_rules_;
  StateView state_view_;
  bool refreshed_ = false;        // the step under way is one of the steady state
  bool holds_gradients_ = false;  // of the step under way, or of one that was broken off
};

}  // namespace gradfast
