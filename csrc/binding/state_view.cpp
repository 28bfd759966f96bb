#include "binding/state_view.h"

namespace gradfast {

bool StateView::matches(PyObject* state) const {
  if (static_cast<std::size_t>(PyDict_GET_SIZE(state)) != entries_.size()) return false;
  PyObject *parameter, *entries, *key, *value;
  Py_ssize_t outer = 0;
  const pybind11::object* expected = values_.data();
  for (const Entry& entry : entries_) {
    PyDict_Next(state, &outer, &parameter, &entries);
    if (parameter != entry.parameter.ptr() || entries != entry.entries.ptr()) return false;
    if (entry.values >= 0 && PyDict_GET_SIZE(entries) != entry.values) return false;
    Py_ssize_t inner = 0;
    for (Py_ssize_t left = entry.values; left > 0; --left) {
      PyDict_Next(entries, &inner, &key, &value);
      if (value != (expected++)->ptr()) return false;
    }
  }
  return true;
}

void StateView::remember(PyObject* state) {
  entries_.clear();
  values_.clear();
  PyObject *parameter, *entries, *key, *value;
  Py_ssize_t outer = 0;
  while (PyDict_Next(state, &outer, &parameter, &entries)) {
    const bool is_dictionary = PyDict_Check(entries);
    entries_.push_back({pybind11::reinterpret_borrow<pybind11::object>(parameter),
                        pybind11::reinterpret_borrow<pybind11::object>(entries),
                        is_dictionary ? PyDict_GET_SIZE(entries) : -1});
    Py_ssize_t inner = 0;
    while (is_dictionary && PyDict_Next(entries, &inner, &key, &value)) {
      values_.push_back(pybind11::reinterpret_borrow<pybind11::object>(value));
    }
  }
}

}  // namespace gradfast
