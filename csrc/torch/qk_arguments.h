// Arguments of the operators on queries and keys, checked.
#pragma once

#include <algorithm>

#include "attention.h"

namespace inflection {

inline AttentionStatsQkArgs qk_arguments(const Tensor& query, const Tensor& key, const MaybeTensor& attn_mask,
                                         bool is_causal, double scale, int64_t window_left, int64_t window_right,
                                         double softcap, const MaybeTensor& rows, const MaybeTensor& key_bounds) {
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
  STD_TORCH_CHECK(args.dtype != DType::boolean && dtype_of(key, "key") == args.dtype,
                  "query, key: need one float dtype");
  STD_TORCH_CHECK(
      key.size(0) == args.batch && key.size(3) == args.head_dim && args.kv_heads > 0 && args.heads % args.kv_heads == 0,
      "query, key: shapes do not match");
  STD_TORCH_CHECK(args.head_dim >= 1 && args.head_dim <= kMaxHeadDim, "query: head dimension outside [1, ", kMaxHeadDim,
                  "]");
  STD_TORCH_CHECK(args.queries <= kMostKeys && args.keys <= kMostKeys, "query, key: expected at most ", kMostKeys,
                  " queries and keys, got ", args.queries, " and ", args.keys);
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
    args.rows = elements<const int64_t>(*rows, "rows", -1);
    args.num_rows = rows->numel();
  }
  if (key_bounds) {
    STD_TORCH_CHECK(args.queries == args.keys, "key_bounds: packed sequences need as many queries as keys");
    args.key_bounds = elements<const int64_t>(*key_bounds, "key_bounds", 2 * args.queries);
  }
  return args;
}

// Least number of row blocks per thread: about 1e5 vector multiply-adds.
inline int64_t grain_of(const AttentionStatsQkArgs& args, int64_t items) {
  const double work = double(args.batch) * args.heads * args.num_rows * args.keys * args.head_dim;
  return std::max<int64_t>(1, static_cast<int64_t>(1e6 * double(std::max<int64_t>(items, 1)) / std::max(work, 1.)));
}

}  // namespace inflection
