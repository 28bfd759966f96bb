#include "binding/state_view.h"

namespace gradfast {
namespace {

// Calls `visit(object)` for every parameter, inner dictionary and value, in order, until it returns false.
template <class Visit>
bool walk(PyObject* state, Visit&& visit) {
  PyObject *parameter, *entries, *key, *value;
  Py_ssize_t outer = 0;
  while (PyDict_Next(state, &outer, &parameter, &entries)) {
    if (!visit(parameter) || !visit(entries)) return false;
    if (!PyDict_Check(entries)) continue;
    Py_ssize_t inner = 0;
    while (PyDict_Next(entries, &inner, &key, &value)) {
      if (!visit(value)) return false;
    }
  }
  return true;
}

}  // namespace

bool StateView::unchanged(PyObject* state) {
  if (matches(state)) return true;
  remember(state);
  return false;
}

bool StateView::matches(PyObject* state) const {
  std::size_t seen = 0;
  const bool same =
      walk(state, [&](PyObject* object) { return seen < objects_.size() && objects_[seen++].ptr() == object; });
  return same && seen == objects_.size();
}

void StateView::remember(PyObject* state) {
  objects_.clear();
  walk(state, [&](PyObject* object) {
    objects_.push_back(pybind11::reinterpret_borrow<pybind11::object>(object));
    return true;
  });
}

}  // namespace gradfast
