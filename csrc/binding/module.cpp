// The Python module gradfast._C.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "binding/engine.h"
#include "binding/policy_chain.h"
#include "cpu/instruction_set.h"

#ifndef GRADFAST_CUDA_ARCHS
#define GRADFAST_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using gradfast::Engine;
  using gradfast::PolicyChain;
  using gradfast::Report;
  using gradfast::StepSettings;

  py::class_<PolicyChain>(module, "PolicyChain")
      .def(py::init(&gradfast::chain_of), py::arg("policies"))
      .def_property_readonly("state_size", &gradfast::state_size)
      .def("run", &gradfast::run_chain_over, py::arg("state"), py::arg("norms"))
      .def("parameter_coefficients", &gradfast::parameter_coefficients, py::arg("state"), py::arg("norms"));

  module.def("clip_by_policies_", &gradfast::clip_by_policies_, py::arg("gradients"), py::arg("weights"),
             py::arg("numbers"), py::arg("settings"));

  py::class_<Report>(module, "Report")
      .def(py::init(&gradfast::report_of), py::arg("bytes"))
      .def_readonly("sum", &Report::sum)
      .def_readonly("norm", &Report::norm)
      .def_readonly("coefficient", &Report::coefficient)
      .def_readonly("limit", &Report::limit)
      .def_readonly("decider", &Report::decider)
      .def_readonly("skipped", &Report::skipped)
      .def_readonly("skipped_steps", &Report::skipped_steps)
      .def_readonly("first_nonfinite", &Report::first_nonfinite);

  py::class_<StepSettings>(module, "StepSettings")
      .def(py::init<>())
      .def_readwrite("element_limit", &StepSettings::element_limit)
      .def_readwrite("max_norm", &StepSettings::max_norm)
      .def_readwrite("norm_type", &StepSettings::norm_type)
      .def_readwrite("propagate", &StepSettings::propagate)
      .def_readwrite("loss_scale", &StepSettings::loss_scale)
      .def_readwrite("found_infinite", &StepSettings::found_infinite)
      .def_readwrite("parameters_by_chance", &StepSettings::parameters_by_chance)
      .def_readwrite("states_by_chance", &StepSettings::states_by_chance)
      .def_readwrite("rounding_seed", &StepSettings::rounding_seed)
      .def_readwrite("group_limits", &StepSettings::group_limits)
      .def_readwrite("clips_updates", &StepSettings::clips_updates)
      .def_readwrite("unit_clipping", &StepSettings::unit_clipping)
      .def_readwrite("unit_eps", &StepSettings::unit_eps)
      .def_readwrite("policies", &StepSettings::policies)
      .def_readwrite("policy_state", &StepSettings::policy_state);

  py::class_<Engine>(module, "Engine")
      .def(py::init<std::vector<at::Tensor>, std::vector<int>, std::vector<std::string>, std::vector<bool>>(),
           py::arg("parameters"), py::arg("group_of"), py::arg("names"), py::arg("by_units") = std::vector<bool>{})
      .def("read_groups", &Engine::read_groups, py::arg("param_groups"), py::arg("rule_settings"))
      .def("step", &Engine::step, py::arg("state"), py::arg("settings"))
      .def("measure", &Engine::measure, py::arg("state"), py::arg("settings"))
      .def("measures_updates_apart", &Engine::measures_updates_apart)
      .def("measure_updates", &Engine::measure_updates, py::arg("total_sum"), py::arg("parameter_sums") = py::none())
      .def("update", &Engine::update, py::arg("total_sum"), py::arg("parameter_sums") = py::none(),
           py::arg("update_means") = py::none())
      .def("total_sum", &Engine::total_sum)
      .def("member_sums", &Engine::member_sums)
      .def("update_sums", &Engine::update_sums)
      .def("grad_norm", &Engine::grad_norm)
      .def("coefficient", &Engine::coefficient)
      .def("skipped_steps", &Engine::skipped_steps)
      .def("last_skipped", &Engine::last_skipped)
      .def("skipped_on_host", &Engine::skipped_on_host)
      .def("found_infinite", &Engine::found_infinite)
      .def("report", &Engine::report)
      .def("report_bytes", &Engine::report_bytes)
      .def("nonfinite_parameter", &Engine::nonfinite_parameter)
      .def("grad_norms", &Engine::grad_norms)
      .def("mark_fresh", &Engine::mark_fresh, py::arg("parameters"))
      .def("forget_fresh", &Engine::forget_fresh)
      .def("never_updated", &Engine::never_updated);

  module.def("cpu_capability", [] { return gradfast::cpu::name(gradfast::cpu::instruction_set()); });
  module.def("cuda_built", [] {
#ifdef GRADFAST_WITH_CUDA
    return true;
#else
    return false;
#endif
  });
  module.def("cuda_architectures", [] { return GRADFAST_CUDA_ARCHS; });
}
