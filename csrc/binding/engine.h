// The cached plan behind an optimiser: it holds the parameters, reads `.grad` itself, and steps every device's tensors
// with one call.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/extension.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding/backend.h"
#include "binding/state_view.h"

namespace gradfast {

// One parameter group of one step: rule, hyper-parameters in the rule's order, names of its states, and the learning
// rate as a tensor where it lives on the device.
using GroupSettings = std::tuple<std::string, std::vector<double>, std::vector<std::string>, std::optional<at::Tensor>>;

class Engine {
 public:
  // `group_of[i]` and `names[i]` belong to `parameters[i]`.
  Engine(std::vector<at::Tensor> parameters, std::vector<int> group_of, std::vector<std::string> names);

  // One step. Returns the indices of parameters that have a gradient but no state yet: then nothing was done, and the
  // caller makes those states and calls again. Throws before anything is written if a tensor cannot be stepped.
  std::vector<int> step(pybind11::dict state, const std::vector<GroupSettings>& groups, double max_norm,
                        double norm_type, bool propagate);

  at::Tensor grad_norm();    // 0-d, fp32 or fp64: of the last step, before clipping
  at::Tensor coefficient();  // 0-d, likewise
  std::int64_t skipped_steps();
  std::int64_t last_skipped();        // 1 if the last step was skipped: waits for the device
  bool skipped_on_host();             // the same without waiting: false where only a device knows
  std::string nonfinite_parameter();  // name of the first parameter whose gradient was not finite, or ""
  std::vector<std::pair<std::string, at::Tensor>> grad_norms();

  // The caller has just made the states of these parameters: their next update is their first.
  void mark_fresh(const std::vector<int>& parameters);
  // Parameters with a state that no step has changed yet.
  std::vector<int> never_updated();

 private:
  struct Member {  // one parameter
    const at::Tensor& parameter() const { return arrays[kParameter]; }

    std::vector<at::Tensor> arrays;  // parameter, gradient of this step, states
    int group;
    std::string name;
    at::Tensor step;      // 0-d float: the state's own "step", or `updates`
    at::Tensor updates;   // 0-d float, for rules whose state has no step count
    bool active = false;  // has a gradient in this step
    bool fresh = false;   // its states were made just now
  };

  // The members of one device.
  struct Part {
    explicit Part(at::Device on) : device(on), backend(make_backend(on)) {}
    at::Device device;
    std::unique_ptr<Backend> backend;
    Problem problem;
    std::vector<Slot> previous;
    std::vector<int> previous_rules;
    std::vector<int> members;  // index of the member in each slot
  };

  bool collect_gradients();
  std::vector<int> bind_states(const pybind11::dict& state, const std::vector<GroupSettings>& groups);
  bool bind_member(Member& member, PyObject* entries, const GroupSettings& settings);
  Part& part_on(at::Device device);
  void fill_slots(const std::vector<GroupSettings>& groups);
  void run_parts(const Norm& norm);
  bool changed(Part& part) const;
  at::Tensor result(at::Tensor value) const;

  std::vector<Member> members_;
  std::vector<Part> parts_;
  std::vector<std::string> bound_rules_;
  StateView state_view_;
  Norm norm_;
};

}  // namespace gradfast
