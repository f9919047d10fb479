// Every operator of the package, one schema a line. Fakes and derivatives stand beside the Python wrappers.
#ifndef USE_CUDA  // the CPU library is always loaded and defines the schemas; the CUDA library only adds kernels
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(inflection_fast, m) {
  m.def("sum_of_squares(Tensor[] tensors, int[] groups, int num_groups) -> Tensor");
  m.def("cpu_isa(int limit) -> int");
}
// clang-format on
#endif
