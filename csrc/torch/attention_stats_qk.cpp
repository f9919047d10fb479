// attention_stats_qk: statistics of softmax rows from Q and K, and their gradients.
#include <tuple>

#include "qk_arguments.h"

namespace inflection {
namespace {

using RowTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

RowTensors attention_stats_qk(Tensor query, Tensor key, MaybeTensor attn_mask, bool is_causal, double scale,
                              int64_t window_left, int64_t window_right, double softcap, MaybeTensor sinks,
                              MaybeTensor rows, MaybeTensor key_bounds, bool entropy_only) {
  AttentionStatsQkArgs args =
      qk_arguments(query, key, attn_mask, is_causal, scale, window_left, window_right, softcap, rows, key_bounds);
  if (sinks) args.sinks = elements<const float>(*sinks, "sinks", args.heads);
  const auto full = [&](float*& pointer) {
    Tensor tensor = new_float(query, {args.batch, args.heads, args.num_rows});
    pointer = data<float>(tensor);
    return tensor;
  };
  const auto unless_entropy_only = [&](float*& pointer) {
    return entropy_only ? new_float(query, {0}) : full(pointer);
  };
  Tensor entropy = full(args.out.entropy), lse = full(args.out.lse), lse_low = full(args.out.lse_low);
  Tensor max_logit = unless_entropy_only(args.out.max_logit), keys = unless_entropy_only(args.out.keys);
  Tensor collision = unless_entropy_only(args.out.collision), sink = unless_entropy_only(args.out.sink);
  INFLECTION_RUN(attention_stats_qk, args, query, attention_stats_qk_items(args),
                 grain_of(args, attention_stats_qk_items(args)));
  return {entropy, lse, max_logit, keys, collision, sink, lse_low};
}

std::tuple<Tensor, Tensor> attention_stats_qk_backward(MaybeTensor grad_entropy, MaybeTensor grad_lse,
                                                       MaybeTensor grad_collision, MaybeTensor grad_sink,
                                                       Tensor entropy, Tensor lse, Tensor collision, Tensor sink,
                                                       Tensor lse_low, Tensor query, Tensor key, MaybeTensor attn_mask,
                                                       bool is_causal, double scale, int64_t window_left,
                                                       int64_t window_right, double softcap, bool has_sinks,
                                                       MaybeTensor rows, MaybeTensor key_bounds) {
  AttentionStatsQkBackwardArgs args{};
  args.forward =
      qk_arguments(query, key, attn_mask, is_causal, scale, window_left, window_right, softcap, rows, key_bounds);
  args.forward.has_sinks = has_sinks;
  const AttentionStatsQkArgs& forward = args.forward;
  const int64_t count = forward.batch * forward.heads * forward.num_rows;
  args.rows =
      row_gradients(count, grad_entropy, grad_lse, grad_collision, grad_sink, entropy, lse, collision, sink, lse_low);
  Tensor grad_query = new_float(query, {forward.batch, forward.heads, forward.num_rows, forward.head_dim});
  Tensor grad_key = new_float(query, {forward.batch, forward.kv_heads, forward.keys, forward.head_dim});
  args.grad_query = data<float>(grad_query);
  args.grad_key = data<float>(grad_key);
  INFLECTION_RUN(attention_stats_qk_grad_query, args, query, attention_stats_qk_grad_query_items(args),
                 grain_of(forward, attention_stats_qk_grad_query_items(args)));
  INFLECTION_RUN(attention_stats_qk_grad_key, args, query, attention_stats_qk_grad_key_items(args), 1);
  return {grad_query, grad_key};
}

}  // namespace

// clang-format off
INFLECTION_SCHEMAS(m) {
  m.def("attention_stats_qk(Tensor query, Tensor key, Tensor? attn_mask, bool is_causal, float scale, int window_left, int window_right, float softcap, Tensor? sinks, Tensor? rows, Tensor? key_bounds, bool entropy_only) -> (Tensor entropy, Tensor lse, Tensor max_logit, Tensor keys, Tensor collision, Tensor sink, Tensor lse_low)");
  m.def("attention_stats_qk_backward(Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_collision, Tensor? grad_sink, Tensor entropy, Tensor lse, Tensor collision, Tensor sink, Tensor lse_low, Tensor query, Tensor key, Tensor? attn_mask, bool is_causal, float scale, int window_left, int window_right, float softcap, bool has_sinks, Tensor? rows, Tensor? key_bounds) -> (Tensor grad_query, Tensor grad_key)");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("attention_stats_qk", TORCH_BOX(&attention_stats_qk));
  m.impl("attention_stats_qk_backward", TORCH_BOX(&attention_stats_qk_backward));
}

}  // namespace inflection
