// csrc/core for Python, without torch: compiled by the test that uses it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/row_state.h"

namespace py = pybind11;
using inflection::RowState;

PYBIND11_MODULE(row_state, m) {
  py::class_<RowState>(m, "RowState")
      .def(py::init<>())
      .def("push",
           [](RowState& s, py::array_t<float> x) {
    for (py::ssize_t i = 0; i < x.size(); ++i) s.push(x.at(i));
  })
      .def("merge", &RowState::merge)
      .def("see_first", [](RowState& s, float x) { s.first = x; })
      .def_readonly("max", &RowState::max)
      .def_readonly("keys", &RowState::keys)
      .def("entropy", &RowState::entropy)
      .def("lse", &RowState::lse)
      .def("collision", &RowState::collision)
      .def("sink", &RowState::sink);
}
