// The optimiser's `param_groups`, seen from C++: what they say is turned into numbers once, and again where it changes.
//
// Users and schedulers write into these dictionaries whenever they like, so they are looked at in each step; comparing
// their values' addresses with those of last time costs nanoseconds, and only a difference asks Python for the
// settings.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "plan/problem.h"

namespace gradfast {

// One parameter group of one step: rule, hyper-parameters in the rule's order, names of its states, and the learning
// rate as a tensor where it lives on the device. One name more than the rule has states is that of the fp32 masters of
// 16-bit parameters. Last, whether the state must hold a count of updates, "step".
using GroupSettings =
    std::tuple<std::string, std::vector<double>, std::vector<std::string>, std::optional<at::Tensor>, bool>;

class ParamGroups {
 public:
  // `group_of[i]` belongs to `parameters[i]`.
  ParamGroups(const std::vector<at::Tensor>& parameters, std::vector<int> group_of);

  // True if `param_groups` holds these parameters, in these groups.
  bool match(const pybind11::list& param_groups) const;

  // Reads what changed since the last time, by `rule_settings(group) -> GroupSettings`, which must depend on the group
  // alone. Throws where a rule cannot take it.
  void refresh(const pybind11::list& param_groups, const pybind11::function& rule_settings);

  const std::vector<GroupSettings>& settings() const { return settings_; }
  const std::vector<Group>& groups() const { return groups_; }

 private:
  struct Seen {
    std::vector<pybind11::object> items;  // keys and values, owned, so that no address can come back as another object
    bool constant = false;                // none of the values can change in place
  };

  static bool unchanged(const Seen& seen, PyObject* group);
  static Seen look_at(PyObject* group);

  std::vector<pybind11::object> parameters_;
  std::vector<int> group_of_;
  std::vector<Seen> seen_;
  std::vector<GroupSettings> settings_;
  std::vector<Group> groups_;
};

}  // namespace gradfast
