// How scores are formed from logits and from products of Q and K, and which keys a row attends.
//
// Values are not scaled if no mask is added and there is no softcap: differences of the given values are nearly exact,
// differences of rounded products are not.
#pragma once

#include "core/exact_sum.h"
#include "core/host_device.h"
#include "kernels.h"

namespace INFLECTION_CORE {

struct ScoreScale {
  double factor;  // values are multiplied by it: 1 or -1, or the whole scale
  double scale;   // the remaining factor, > 0

  // `keep`: only a boolean mask follows the scale, so values can stay unscaled, unless the scale is so small or large that
  // centred values could leave the range of a float.
  static IF_HD ScoreScale of(double scale, bool keep) {
    constexpr double kSmallest = 1e-28, kLargest = 1e28;
    const double magnitude = scale < 0.0 ? -scale : scale;
    if (!keep || !(magnitude >= kSmallest && magnitude <= kLargest)) return {scale, 1.0};
    return {scale < 0.0 ? -1.0 : 1.0, magnitude};
  }
};

IF_HD bool is_additive(const Mask& mask) { return mask.data != nullptr && mask.dtype != DType::boolean; }

// Scores from logits. With an additive mask a score is the sum of two floats, value + low, exact to 48 bits: rounded to
// one, scores of 1e4 would err by 5e-4.
struct LogitForm {
  bool low;                  // an additive mask: scores are value + low
  float factor, factor_low;  // values are multiplied by their sum
  double scale;              // the remaining factor, > 0

  static IF_HD LogitForm of(const AttentionStatsArgs& args) {
    const bool low = is_additive(args.mask);
    const ScoreScale form = ScoreScale::of(args.scale, !low);
    const float factor = static_cast<float>(form.factor);
    return {low, factor, static_cast<float>(form.factor - factor), form.scale};
  }
};

// A larger `low`, which occurs at scores of 2^24 and more, is dropped: rows are centred on their largest value, and e^low
// could leave the range of a float.
constexpr float kMostLow = 1.f;

// value + low = v (factor + factor_low) + bias, where `product` is v * factor rounded and `lost` its rounding error. For
// numbers or vectors.
template <class V>
IF_HD void add_bias(V v, V product, V lost, V factor_low, V bias, V& value, V& low) {
  const V total = product + bias;
  V rest = lost + (v * factor_low + lost_in_sum(product, bias, total));
  rest = rest - rest == 0.f ? rest : V{};  // 0 for scores beyond the range of a float
  value = total + rest;  // if the mask cancels the product, `rest` can exceed half an ulp of the total
  rest -= value - total;
  low = (rest < 0.f ? -rest : rest) <= kMostLow ? rest : V{};  // also 0 for NaN
}

// c tanh(score / c), and its derivative in `slope`; `tanh` is that of the kernel.
IF_CALLS_BACK template <class V, class Tanh>
IF_HD V softcapped(V score, float softcap, V& slope, const Tanh& tanh) {
  const V capped = tanh(score * (1.f / softcap));
  slope = 1.f - capped * capped;
  return capped * softcap;
}

struct Range {
  int64_t low, high;  // [low, high); high <= low: nothing

  IF_HD void clip(int64_t least, int64_t most) {
    low = least > low ? least : low;
    high = most < high ? most : high;
  }
};

// Keys that the row at a position may attend by causal and window bounds and its packed sequence; none if the position is
// outside [0, Tq).
IF_HD Range keys_of_row(const AttentionStatsQkArgs& args, int64_t position) {
  if (position < 0 || position >= args.queries) return {0, 0};
  Range keys{0, args.keys};
  if (args.window_left >= 0) keys.clip(position - args.window_left, args.keys);
  if (args.window_right >= 0) keys.clip(0, position + args.window_right + 1);
  if (args.causal) keys.clip(0, position + 1);
  if (args.key_bounds != nullptr) keys.clip(args.key_bounds[2 * position], args.key_bounds[2 * position + 1]);
  if (keys.low > args.keys) keys.low = args.keys;
  if (keys.high < keys.low) keys.high = keys.low;
  return keys;
}

// Positions of the rows that may attend a key. With packed sequences, they are the positions of the key's own sequence.
IF_HD Range rows_of_key(const AttentionStatsQkArgs& args, int64_t key) {
  Range rows{0, args.queries};
  if (args.causal) rows.clip(key, args.queries);
  if (args.window_right >= 0) rows.clip(key - args.window_right, args.queries);
  if (args.window_left >= 0) rows.clip(0, key + args.window_left + 1);
  if (args.key_bounds != nullptr) rows.clip(args.key_bounds[2 * key], args.key_bounds[2 * key + 1]);
  return rows;
}

// The key that `sink` reports if there is no sink column: the first key of the row's sequence.
IF_HD int64_t sink_key(const AttentionStatsQkArgs& args, int64_t position) {
  const int64_t first = args.key_bounds == nullptr ? 0 : args.key_bounds[2 * position];
  return first > 0 ? first : 0;
}

}  // namespace INFLECTION_CORE
