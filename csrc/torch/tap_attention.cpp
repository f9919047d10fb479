// tap_attention: sums of attention_stats_qk over batch and sampled rows, written to a slot if a flag is set.
#include "qk_arguments.h"
#include "tap.h"

namespace inflection {
namespace {

void tap_attention(Tensor query, Tensor key, MaybeTensor attn_mask, bool is_causal, double scale, int64_t window_left,
                   int64_t window_right, double softcap, MaybeTensor sinks, MaybeTensor tokens, MaybeTensor draws,
                   Tensor flag, Tensor slots, int64_t slot) {
  const int32_t* const is_up = flag_of(flag, query);
  if (is_down(is_up)) return;
  AttentionStatsQkArgs args = qk_arguments(query, key, attn_mask, is_causal, scale, window_left, window_right, softcap,
                                           std::nullopt, std::nullopt);
  TapAttentionArgs tap{};
  tap.sums = slot_of(slots, query, slot, 3, kTapSums);
  tap.pitch = slots.size(2);
  tap.batch = args.batch, tap.heads = args.heads, tap.queries = args.queries, tap.flag = is_up;
  STD_TORCH_CHECK(args.heads <= tap.pitch, "slots: have room for ", tap.pitch, " heads, query has ", args.heads);
  if (sinks) args.sinks = elements<const float>(*sinks, "sinks", args.heads);
  if (tokens) {
    check_device(*tokens, "tokens");
    STD_TORCH_CHECK(tokens->scalar_type() == ScalarType::Bool && tokens->dim() == 2 &&
                        (tokens->size(0) == args.batch || tokens->size(0) == 1) && tokens->size(1) == args.queries,
                    "tokens: expected bool [B or 1, Tq]");
    tap.tokens = data<const bool>(*tokens);
    tap.token_strides[0] = tokens->size(0) == 1 ? 0 : tokens->stride(0);
    tap.token_strides[1] = tokens->stride(1);
  }
  TapRowsArgs choice{nullptr, args.queries, args.queries, is_up, nullptr};
  if (draws && draws->numel() < args.queries) {
    choice.draws = elements<const double>(*draws, "draws", -1);
    choice.num_rows = draws->numel();
  }
  const Tensor rows = new_tensor(query, {choice.num_rows}, ScalarType::Long);
#ifdef INFLECTION_CPU_KERNELS
  const bool all_rows = !choice.draws;  // the flag is set, so no row must be hidden from the kernel
#else
  const bool all_rows = false;
#endif
  if (!all_rows) {
    choice.rows = data<int64_t>(rows);
    INFLECTION_RUN(tap_rows, choice, query, choice.num_rows, choice.num_rows);
    args.rows = tap.positions = choice.rows;
  }
  args.num_rows = tap.num_rows = choice.num_rows;
  const Tensor stats = new_float(query, {7, args.batch, args.heads, args.num_rows});
  float* next = data<float>(stats);
  for (float** out : {&args.out.entropy, &args.out.lse, &args.out.lse_low, &args.out.max_logit, &args.out.keys,
                      &args.out.collision, &args.out.sink}) {
    *out = next;
    next += args.batch * args.heads * args.num_rows;
  }
  tap.stats = args.out;
  INFLECTION_RUN(attention_stats_qk, args, query, attention_stats_qk_items(args),
                 grain_of(args, attention_stats_qk_items(args)));
  INFLECTION_RUN(tap_attention, tap, query, args.heads, args.heads);
}

}  // namespace

// clang-format off
INFLECTION_SCHEMAS(m) {
  m.def("tap_attention(Tensor query, Tensor key, Tensor? attn_mask, bool is_causal, float scale, int window_left, int window_right, float softcap, Tensor? sinks, Tensor? tokens, Tensor? draws, Tensor flag, Tensor(a!) slots, int slot) -> ()");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("tap_attention", TORCH_BOX(&tap_attention));
}

}  // namespace inflection
