// attention_stats_qk: statistics of softmax rows from Q and K, and their gradients.
#include <algorithm>
#include <tuple>

#include "mask.h"

namespace inflection {
namespace {

using MaybeTensor = std::optional<Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

AttentionStatsQkArgs arguments(const Tensor& query, const Tensor& key, const MaybeTensor& attn_mask, bool is_causal,
                               double scale, int64_t window_left, int64_t window_right, double softcap,
                               const MaybeTensor& rows, const MaybeTensor& key_bounds) {
  check_device(query, "query");
  check_device(key, "key");
  STD_TORCH_CHECK(query.get_device() == key.get_device(), "key: must be on the device of query");
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query, key: need 4 dimensions");
  AttentionStatsQkArgs args{};
  args.query = query.const_data_ptr();
  args.key = key.const_data_ptr();
  for (int d = 0; d < 4; ++d) {
    args.query_strides[d] = query.stride(d);
    args.key_strides[d] = key.stride(d);
  }
  args.batch = query.size(0);
  args.heads = query.size(1);
  args.kv_heads = key.size(1);
  args.queries = query.size(2);
  args.keys = key.size(2);
  args.head_dim = query.size(3);
  args.dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(args.dtype != DType::boolean && dtype_of(key, "key") == args.dtype, "query, key: need one float dtype");
  STD_TORCH_CHECK(key.size(0) == args.batch && key.size(3) == args.head_dim && args.kv_heads > 0 &&
                      args.heads % args.kv_heads == 0,
                  "query, key: shapes do not match");
  STD_TORCH_CHECK(args.head_dim >= 1 && args.head_dim <= kMaxHeadDim, "query: head dimension outside [1, ", kMaxHeadDim, "]");
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.window_left = window_left;
  args.window_right = window_right;
  args.causal = is_causal;
  args.num_rows = args.queries;
  args.mask = mask_of(attn_mask, query);
  if (attn_mask) {
    const int64_t sizes[] = {args.batch, args.heads, args.queries, args.keys};
    int64_t strides[4];
    broadcast_strides(*attn_mask, sizes, 4, strides);
    args.mask.strides[0] = strides[0], args.mask.strides[1] = strides[1];
    args.mask.row_stride = strides[2], args.mask.col_stride = strides[3];
  }
  if (rows) {
    check_device(*rows, "rows");
    STD_TORCH_CHECK(rows->dim() == 1 && rows->is_contiguous() && rows->scalar_type() == ScalarType::Long,
                    "rows: need one contiguous int64 dimension");
    args.rows = static_cast<const int64_t*>(rows->const_data_ptr());
    args.num_rows = rows->size(0);
  }
  if (key_bounds) {
    check_device(*key_bounds, "key_bounds");
    STD_TORCH_CHECK(key_bounds->dim() == 2 && key_bounds->size(0) == args.queries && key_bounds->size(1) == 2 &&
                        key_bounds->is_contiguous() && key_bounds->scalar_type() == ScalarType::Long,
                    "key_bounds: need contiguous int64 [queries, 2]");
    STD_TORCH_CHECK(args.queries == args.keys, "key_bounds: packed sequences need as many queries as keys");
    args.key_bounds = static_cast<const int64_t*>(key_bounds->const_data_ptr());
  }
  return args;
}

// Row blocks that are worth a thread of their own: about 1e5 multiply-adds in vectors.
[[maybe_unused]] int64_t grain_of(const AttentionStatsQkArgs& args, int64_t items) {
  const double work = double(args.batch) * args.heads * args.num_rows * args.keys * args.head_dim;
  return std::max<int64_t>(1, static_cast<int64_t>(1e6 * double(std::max<int64_t>(items, 1)) / std::max(work, 1.)));
}

SixTensors attention_stats_qk(Tensor query, Tensor key, MaybeTensor attn_mask, bool is_causal, double scale,
                              int64_t window_left, int64_t window_right, double softcap, MaybeTensor sinks,
                              MaybeTensor rows, MaybeTensor key_bounds, bool entropy_only) {
  AttentionStatsQkArgs args =
      arguments(query, key, attn_mask, is_causal, scale, window_left, window_right, softcap, rows, key_bounds);
  if (sinks) {
    check_device(*sinks, "sinks");
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == args.heads && sinks->is_contiguous() &&
                        sinks->scalar_type() == ScalarType::Float,
                    "sinks: need one contiguous float32 per head");
    args.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  const auto full = [&] { return new_float(query, {args.batch, args.heads, args.num_rows}); };
  const auto wanted = [&] { return entropy_only ? new_float(query, {0}) : full(); };
  Tensor entropy = full(), lse = full(), max_logit = wanted(), keys = wanted(), collision = wanted(), sink = wanted();
  const auto data = [](Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  args.out.entropy = data(entropy);
  args.out.lse = data(lse);
  if (!entropy_only) {
    args.out.max_logit = data(max_logit);
    args.out.keys = data(keys);
    args.out.collision = data(collision);
    args.out.sink = data(sink);
  }
  INFLECTION_RUN(attention_stats_qk, args, query, attention_stats_qk_items(args),
                 grain_of(args, attention_stats_qk_items(args)));
  return {entropy, lse, max_logit, keys, collision, sink};
}

std::tuple<Tensor, Tensor> attention_stats_qk_backward(
    MaybeTensor grad_entropy, MaybeTensor grad_lse, MaybeTensor grad_collision, MaybeTensor grad_sink, Tensor entropy,
    Tensor lse, Tensor collision, Tensor sink, Tensor query, Tensor key, MaybeTensor attn_mask, bool is_causal,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool has_sinks, MaybeTensor rows,
    MaybeTensor key_bounds) {
  AttentionStatsQkBackwardArgs args{};
  args.forward =
      arguments(query, key, attn_mask, is_causal, scale, window_left, window_right, softcap, rows, key_bounds);
  args.forward.has_sinks = has_sinks;
  const AttentionStatsQkArgs& forward = args.forward;
  const int64_t count = forward.batch * forward.heads * forward.num_rows;
  const auto rows_of = [&](const MaybeTensor& tensor, const char* name) -> const float* {
    if (!tensor) return nullptr;
    check_device(*tensor, name);
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && tensor->numel() == count, name,
                    ": expected one contiguous float32 value for each of the ", count, " rows");
    return static_cast<const float*>(tensor->const_data_ptr());
  };
  args.rows = {.entropy = rows_of(entropy, "entropy"),
               .lse = rows_of(lse, "lse"),
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
