// The optimiser's state dictionary, seen from C++.
//
// `optimizer.state` belongs to Python: load_state_dict replaces it, tools move its tensors between devices. Looking up
// three keys a parameter at each step would cost more than the step; walking the dictionaries' entries and comparing
// pointers with those of last time costs nanoseconds, and only a difference makes the engine look again.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace gradfast {

class StateView {
 public:
  // True if `state` (parameter -> {key: value}) holds the same objects in the same order as when remembered last.
  bool matches(PyObject* state) const;
  void remember(PyObject* state);

 private:
  struct Entry {
    pybind11::object parameter, entries;  // owned, so that no address can come back as another object
    Py_ssize_t values;                    // how many of `values_`; -1 where `entries` is no dictionary
  };

  std::vector<Entry> entries_;
  std::vector<pybind11::object> values_;
};

}  // namespace gradfast
