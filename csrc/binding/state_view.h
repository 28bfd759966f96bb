// The optimiser's state dictionary, seen from C++.
//
// `optimizer.state` belongs to Python: load_state_dict replaces it, tools move its tensors between devices. Looking up
// three keys a parameter at each step would cost more than the step; walking the dictionaries' entries and comparing
// pointers with those of last time costs nanoseconds, and only a difference makes the engine look again. Where Python
// numbers its dictionaries' versions (PEP 509; up to 3.11 in the open), one whose number is the old one is not even
// walked.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace gradfast {

class StateView {
 public:
  // True if `state` (parameter -> {key: value}) holds the same objects in the same order as when remembered last.
  bool matches(PyObject* state);
  void remember(PyObject* state);

 private:
  struct Entry {
    pybind11::object parameter, entries;  // owned, so that no address can come back as another object
    bool is_dictionary;
    std::uint32_t first, values;  // which of `values_` are its
    std::uint64_t version;        // of `entries`, when last seen to hold these
  };

  bool same_parameters(PyObject* state) const;
  bool same_values(const Entry& entry) const;

  std::uint64_t version_ = 0;  // of the dictionary of parameters
  std::vector<Entry> entries_;
  std::vector<pybind11::object> values_;
};

}  // namespace gradfast
