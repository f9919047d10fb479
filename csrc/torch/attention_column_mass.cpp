// attention_column_mass: sums over the rows of probabilities from Q, K and the log-sum-exp of the rows.
#include <tuple>

#include "qk_arguments.h"

namespace inflection {
namespace {

std::tuple<Tensor, Tensor> attention_column_mass(Tensor query, Tensor key, Tensor lse, MaybeTensor attn_mask,
                                                 bool is_causal, double scale, int64_t window_left,
                                                 int64_t window_right, double softcap, MaybeTensor rows,
                                                 MaybeTensor key_bounds) {
  AttentionColumnMassArgs args{};
  args.forward =
      qk_arguments(query, key, attn_mask, is_causal, scale, window_left, window_right, softcap, rows, key_bounds);
  const AttentionStatsQkArgs& forward = args.forward;
  check_device(lse, "lse");
  STD_TORCH_CHECK(lse.get_device() == query.get_device(), "lse: must be on the device of query");
  STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == forward.batch && lse.size(1) == forward.heads &&
                      lse.size(2) == forward.num_rows && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float,
                  "lse: need one contiguous float32 for each of the rows");
  args.lse = static_cast<const float*>(lse.const_data_ptr());
  Tensor mass = new_float(query, {forward.batch, forward.heads, forward.keys});
  Tensor squares = new_float(query, {forward.batch, forward.heads, forward.keys});
  args.mass = static_cast<float*>(mass.mutable_data_ptr());
  args.squares = static_cast<float*>(squares.mutable_data_ptr());
  INFLECTION_RUN(attention_column_mass, args, query, attention_column_mass_items(args),
                 grain_of(forward, attention_column_mass_items(args)));
  return {mass, squares};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("attention_column_mass", TORCH_BOX(&attention_column_mass));
}

}  // namespace inflection
