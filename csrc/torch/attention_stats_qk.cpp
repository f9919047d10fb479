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
  if (sinks) {
    check_device(*sinks, "sinks");
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == args.heads && sinks->is_contiguous() &&
                        sinks->scalar_type() == ScalarType::Float,
                    "sinks: need one contiguous float32 per head");
    args.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  const auto full = [&] { return new_float(query, {args.batch, args.heads, args.num_rows}); };
  const auto wanted = [&] { return entropy_only ? new_float(query, {0}) : full(); };
  Tensor entropy = full(), lse = full(), lse_low = full(), max_logit = wanted(), keys = wanted(), collision = wanted(),
         sink = wanted();
  const auto data = [](Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  args.out.entropy = data(entropy);
  args.out.lse = data(lse);
  args.out.lse_low = data(lse_low);
  if (!entropy_only) {
    args.out.max_logit = data(max_logit);
    args.out.keys = data(keys);
    args.out.collision = data(collision);
    args.out.sink = data(sink);
  }
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
  const auto rows_of = [&](const MaybeTensor& tensor, const char* name) -> const float* {
    if (!tensor) return nullptr;
    check_device(*tensor, name);
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && tensor->numel() == count,
                    name, ": expected one contiguous float32 value for each of the ", count, " rows");
    return static_cast<const float*>(tensor->const_data_ptr());
  };
  args.rows = {.entropy = rows_of(entropy, "entropy"),
               .lse = rows_of(lse, "lse"),
               .lse_low = rows_of(lse_low, "lse_low"),
               .collision = grad_collision ? rows_of(collision, "collision") : nullptr,
               .sink = grad_sink ? rows_of(sink, "sink") : nullptr,
               .grad_entropy = rows_of(grad_entropy, "grad_entropy"),
               .grad_lse = rows_of(grad_lse, "grad_lse"),
               .grad_collision = rows_of(grad_collision, "grad_collision"),
               .grad_sink = rows_of(grad_sink, "grad_sink")};
  Tensor grad_query = new_float(query, {forward.batch, forward.heads, forward.num_rows, forward.head_dim});
  Tensor grad_key = new_float(query, {forward.batch, forward.kv_heads, forward.keys, forward.head_dim});
  args.grad_query = static_cast<float*>(grad_query.mutable_data_ptr());
  args.grad_key = static_cast<float*>(grad_key.mutable_data_ptr());
  INFLECTION_RUN(attention_stats_qk_grad_query, args, query, attention_stats_qk_grad_query_items(args),
                 grain_of(forward, attention_stats_qk_grad_query_items(args)));
  INFLECTION_RUN(attention_stats_qk_grad_key, args, query, attention_stats_qk_grad_key_items(args), 1);
  return {grad_query, grad_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("attention_stats_qk", TORCH_BOX(&attention_stats_qk));
  m.impl("attention_stats_qk_backward", TORCH_BOX(&attention_stats_qk_backward));
}

}  // namespace inflection
