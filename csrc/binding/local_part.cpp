#include "binding/local_part.h"

#include <c10/core/DispatchKey.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

namespace gradfast {
namespace {

namespace py = pybind11;

// Made once: looking an attribute up by a C string makes a Python string each time.
PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

bool is_subclass(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
}

}  // namespace

bool is_sharded(const at::Tensor& tensor) {
  static PyObject* const name = interned("_local_tensor");
  if (!is_subclass(tensor)) return false;
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  return PyObject_HasAttr(object.ptr(), name) != 0;
}

at::Tensor local_part(const at::Tensor& sharded) {
  static PyObject* const name = interned("_local_tensor");
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(sharded));
  auto part = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name));
  if (!part) throw py::error_already_set();
  // What a collective has not delivered yet is a subclass too; waiting for it is a matter of streams.
  if (is_subclass(THPVariable_Unpack(part.ptr())) && py::hasattr(part, "wait")) part = part.attr("wait")();
  return THPVariable_Unpack(part.ptr());
}

}  // namespace gradfast
