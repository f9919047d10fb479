// Every operator of the package, one schema a line. Fakes and derivatives stand beside the Python wrappers.
#ifndef USE_CUDA  // the CPU library is always loaded and defines the schemas; the CUDA library only adds kernels
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(inflection_fast, m) {
  m.def("sum_of_squares(Tensor[] tensors, int[] groups, int num_groups) -> Tensor");
  m.def("attention_stats(Tensor logits, Tensor? attn_mask, bool is_causal, float scale, bool entropy_only) -> (Tensor entropy, Tensor lse, Tensor max_logit, Tensor keys, Tensor collision, Tensor sink)");
  m.def("attention_stats_backward(Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_collision, Tensor? grad_sink, Tensor entropy, Tensor lse, Tensor collision, Tensor sink, Tensor logits, Tensor? attn_mask, bool is_causal, float scale, bool of_scores) -> Tensor");
  m.def("cpu_isa(int limit) -> int");
}
// clang-format on
#endif
