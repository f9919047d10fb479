// Every operator of the package, one schema a line. Fakes and derivatives stand beside the Python wrappers.
#ifndef USE_CUDA  // the CPU library is always loaded and defines the schemas; the CUDA library only adds kernels
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(inflection_fast, m) {
  m.def("sum_of_squares(Tensor[] tensors, int[] groups, int num_groups, Tensor? inv_scale=None) -> Tensor");
  m.def("activation_moments(Tensor output, Tensor? input, Tensor? mask) -> (Tensor sums, Tensor largest)");
  m.def("attention_stats(Tensor logits, Tensor? attn_mask, bool is_causal, float scale, bool entropy_only) -> (Tensor entropy, Tensor lse, Tensor max_logit, Tensor keys, Tensor collision, Tensor sink)");
  m.def("attention_stats_backward(Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_collision, Tensor? grad_sink, Tensor entropy, Tensor lse, Tensor collision, Tensor sink, Tensor logits, Tensor? attn_mask, bool is_causal, float scale, bool of_scores) -> Tensor");
  m.def("attention_stats_qk(Tensor query, Tensor key, Tensor? attn_mask, bool is_causal, float scale, int window_left, int window_right, float softcap, Tensor? sinks, Tensor? rows, Tensor? key_bounds, bool entropy_only) -> (Tensor entropy, Tensor lse, Tensor max_logit, Tensor keys, Tensor collision, Tensor sink, Tensor lse_low)");
  m.def("attention_stats_qk_backward(Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_collision, Tensor? grad_sink, Tensor entropy, Tensor lse, Tensor collision, Tensor sink, Tensor lse_low, Tensor query, Tensor key, Tensor? attn_mask, bool is_causal, float scale, int window_left, int window_right, float softcap, bool has_sinks, Tensor? rows, Tensor? key_bounds) -> (Tensor grad_query, Tensor grad_key)");
  m.def("attention_column_mass(Tensor query, Tensor key, Tensor lse, Tensor? attn_mask, bool is_causal, float scale, int window_left, int window_right, float softcap, Tensor? rows, Tensor? key_bounds) -> (Tensor mass, Tensor squares)");
  m.def("cka_push(Tensor(a!) gram, Tensor(b!) shift, Tensor x, Tensor y, Tensor? mask, bool adopt) -> ()");
  m.def("cka_adopt(Tensor seen, Tensor(a!) shift, Tensor x, Tensor y, Tensor? mask) -> ()");
  m.def("cka_project(Tensor(a!) sums, Tensor x, Tensor y, Tensor shift, Tensor basis, Tensor? mask) -> (Tensor, Tensor)");
  m.def("cka_batches(Tensor x, Tensor? y, int tile, Tensor? factors=None) -> (Tensor cross, Tensor own, Tensor sums)");
  m.def("cka_batches_bytes(int layers_x, int layers_y, int rows, int tile) -> int");
  m.def("cka_gram_terms(Tensor gram, int dim_x, int dim_y, bool debiased) -> Tensor");
  m.def("cka_terms(Tensor x, Tensor y, bool debiased) -> Tensor");
  m.def("cka_terms_backward(Tensor grad, Tensor x, Tensor y, bool debiased) -> (Tensor, Tensor)");
  m.def("cka_scatter(Tensor x, Tensor y) -> Tensor");
  m.def("cka_scatter_backward(Tensor grad, Tensor x, Tensor y) -> (Tensor, Tensor)");
  m.def("cpu_isa(int limit) -> int");
}
// clang-format on
#endif
