// The cached plan behind an optimiser: it holds the parameters, reads `.grad` itself, and steps every device's tensors
// with one call.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "binding/backend.h"
#include "binding/members.h"
#include "binding/param_groups.h"
#include "binding/step_settings.h"

namespace gradfast {

class Engine {
 public:
  // `group_of[i]`, `names[i]` and `by_units[i]` belong to `parameters[i]`; the last says whether AGC clips its units,
  // and may be empty where it clips none.
  Engine(std::vector<at::Tensor> parameters, std::vector<int> group_of, std::vector<std::string> names,
         std::vector<bool> by_units);

  // Takes the hyper-parameters of the groups; see ParamGroups. Returns false if the optimiser's groups hold other
  // parameters than this engine's: then a new one is needed.
  bool read_groups(const pybind11::list& param_groups, const pybind11::function& rule_settings);

  // One step. Returns the indices of parameters that have a gradient but no state yet: then nothing was done, and the
  // caller makes those states and calls again. Throws before anything is written if a tensor cannot be stepped.
  std::vector<int> step(const pybind11::dict& state, const StepSettings& settings);

  // The same step in two halves, for whoever joins the sums of several processes in between: measure() is as step() but
  // changes nothing; update() then clips by `total_sum`, a 0-d double tensor.
  std::vector<int> measure(const pybind11::dict& state, const StepSettings& settings);
  // `parameter_sums`: of the whole parameters in their order, double, for policies that clip each by itself.
  // `update_means`: likewise of their squared updates, where those are clipped.
  void update(const at::Tensor& total_sum, const std::optional<at::Tensor>& parameter_sums,
              const std::optional<at::Tensor>& update_means);

  // Between the two, where the size of an update depends on the norm: measures the updates, for update_sums().
  bool measures_updates_apart() const;
  void measure_updates(const at::Tensor& total_sum, const std::optional<at::Tensor>& parameter_sums);

  // Of what was measured, as double tensors on the devices; nothing waits. A sum is one of powers |x|^p, or the largest
  // magnitude for the infinity norm.
  at::Tensor total_sum();                                              // 0-d, over all devices
  std::vector<std::pair<std::vector<int>, at::Tensor>> member_sums();  // a device: indices of parameters, their sums
  std::vector<std::pair<std::vector<int>, at::Tensor>> update_sums();  // likewise, of squared updates

  at::Tensor grad_norm();    // 0-d, fp32 or fp64: of the last step, before clipping
  at::Tensor coefficient();  // 0-d, likewise
  std::int64_t skipped_steps();
  std::int64_t last_skipped();  // 1 if the last step was skipped: waits for the device
  bool skipped_on_host();       // the same without waiting: false where only a device knows
  // 0-d float on the device, 1 if the last step's norm was not finite; none where no parameter had a gradient.
  std::optional<at::Tensor> found_infinite();
  Report report();                    // of the last step: waits for the device
  at::Tensor report_bytes();          // the same, in a tensor of bytes on the device; nothing waits
  std::string nonfinite_parameter();  // name of the first parameter whose gradient was not finite, or ""
  std::vector<std::pair<std::string, at::Tensor>> grad_norms();

  void mark_fresh(const std::vector<int>& parameters) { members_.mark_fresh(parameters); }
  void forget_fresh() { members_.forget_fresh(); }
  std::vector<int> never_updated() const { return members_.never_updated(); }

 private:
  // The members of one device.
  struct Part {
    explicit Part(at::Device on) : device(on), backend(make_backend(on)) {}
    at::Device device;
    std::unique_ptr<Backend> backend;
    Problem problem;
    bool changed = false;  // since the last run, in a way that makes a new plan
    bool brief = false;    // over before another thread could use the Python lock
    std::vector<Slot> previous;
    std::vector<Layout> previous_layouts;
    std::vector<int> previous_rules;
    std::vector<int> members;                               // index of the member in each slot
    at::Tensor loss_scale, found_infinite;                  // on this device, kept alive for the step
    at::Tensor policy_state, parameter_sums, update_means;  // likewise
  };

  std::vector<int> prepare(const pybind11::dict& state, const StepSettings& settings);
  Part& part_on(at::Device device);
  void fill_slots(const StepSettings& settings);
  void apply(const StepSettings& settings);
  static void run(Part& part, Phase phase, const at::Tensor& total);
  void run_parts(Phase phase, const at::Tensor& total);
  void take_parameter_sums(const std::optional<at::Tensor>& sums);
  at::Tensor by_parameter(const std::optional<at::Tensor>& values, const Part& part, const char* what) const;
  bool changed(Part& part) const;

  ParamGroups groups_;
  Members members_;
  std::vector<bool> by_units_;
  std::vector<Part> parts_;
  Norm norm_;
};

}  // namespace gradfast
