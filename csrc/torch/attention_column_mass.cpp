// attention_column_mass: column sums of probabilities from Q, K and the log-sum-exp of the rows.
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
  STD_TORCH_CHECK(lse.get_device() == query.get_device(), "lse: must be on the device of query");
  args.lse = elements<const float>(lse, "lse", forward.batch * forward.heads * forward.num_rows);
  Tensor mass = new_float(query, {forward.batch, forward.heads, forward.keys});
  Tensor squares = new_float(query, {forward.batch, forward.heads, forward.keys});
  args.mass = data<float>(mass);
  args.squares = data<float>(squares);
  INFLECTION_RUN(attention_column_mass, args, query, attention_column_mass_items(args),
                 grain_of(forward, attention_column_mass_items(args)));
  return {mass, squares};
}

}  // namespace

// clang-format off
INFLECTION_SCHEMAS(m) {
  m.def("attention_column_mass(Tensor query, Tensor key, Tensor lse, Tensor? attn_mask, bool is_causal, float scale, int window_left, int window_right, float softcap, Tensor? rows, Tensor? key_bounds) -> (Tensor mass, Tensor squares)");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("attention_column_mass", TORCH_BOX(&attention_column_mass));
}

}  // namespace inflection
