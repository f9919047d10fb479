// One row of scores from Q and K: its sums as one of the lanes sees them that hold a piece of it, and what is written
// of it.
#pragma once

#include "core/row_state.h"
#include "qk_tiles.cuh"

namespace inflection {

constexpr float kLeastExponent = -127.f;   // 2^x is 0 below
constexpr float kMostReference = 0x1p20f;  // up to which a rounded reference is within 2^-5 of the maximum

// What the sums of a row are centred on, in base 2: x = (score - base) * exponent - reference. A rounded product is as
// good as the maximum where it is small: the sums are exact with respect to it, and x takes one instruction. Where it
// is large x could be anything above 0, so the maximum is subtracted first.
struct Centre {
  float base, reference;

  static __device__ __forceinline__ bool is_large(float max, float exponent) {
    return !(fabsf(max * exponent) <= kMostReference);
  }
  static __device__ __forceinline__ Centre of(float max, float exponent) {
    if (max == -kInf) return {0.f, 0.f};
    return is_large(max, exponent) ? Centre{max, 0.f} : Centre{0.f, max * exponent};
  }
  __device__ __forceinline__ float distance(float score, float exponent) const {
    return at_least(fmaf(score - base, exponent, -reference), kLeastExponent);
  }
};

// One row as one lane sees it.
struct QkLane {
  float max = -kInf;  // of unscaled scores
  float reference = 0.f, sum = 0.f, dot = 0.f, square = 0.f;

  __device__ __forceinline__ void rebase(float highest, float exponent) {
    if (highest == max) return;
    const Centre now = Centre::of(max, exponent), next = Centre::of(highest, exponent);
    float d = at_least(fmaf(now.base - next.base, exponent, now.reference - next.reference), kLeastExponent);
    if (max == -kInf) d = kLeastExponent;
    const float f = exp2_approx(d);
    rebase_sums(d, f, sum, dot, square);
    max = highest;
    reference = next.reference;
  }
  template <bool kAll, bool kLarge, bool kPolynomial = false>
  __device__ __forceinline__ void add(float score, float exponent) {
    const float x = kLarge ? Centre::of(max, exponent).distance(score, exponent)
                           : at_least(fmaf(score, exponent, -reference), kLeastExponent);
    const float e = kPolynomial ? exp2_polynomial(x) : exp2_approx(x);
    sum += e;
    dot = fmaf(e, x, dot);
    if (kAll) square = fmaf(e, e, square);
  }
  // The sum of squares is left out where nobody wants it. Of 16 exponentials kPolynomials are polynomials.
  // kTogether: all lanes of the warp are here, and take the same way whatever their maxima are.
  template <bool kAll, int kPolynomials = 0, bool kTogether = false, int N>
  __device__ __forceinline__ void push(const float (&score)[N], float exponent) {
    float highest = max;
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, score[i]);
    rebase(highest, exponent);
    QkLane part{max, reference};  // from zero: a block of terms rounds less than the whole row
    bool large = max > -kInf && Centre::is_large(max, exponent);
    if (kTogether) large = __any_sync(kAllLanes, large);
    if (large) {
      part.template add_each<kAll, true, kPolynomials>(score, exponent);
    } else {
      part.template add_each<kAll, false, kPolynomials>(score, exponent);
    }
    sum += part.sum;
    dot += part.dot;
    if (kAll) square += part.square;
  }
  template <bool kAll, bool kLarge, int kPolynomials, int N>
  __device__ __forceinline__ void add_each(const float (&score)[N], float exponent) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i * kPolynomials % 16 < kPolynomials) add<kAll, kLarge, true>(score[i], exponent);
      else add<kAll, kLarge>(score[i], exponent);
    }
  }
  // Over the lanes that share a row; the result is in all of them.
  __device__ __forceinline__ void merge_lanes(float exponent) {
    float highest = max;
    for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2)
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, lanes));
    rebase(highest, exponent);
    for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      dot += __shfl_xor_sync(kAllLanes, dot, lanes);
      square += __shfl_xor_sync(kAllLanes, square, lanes);
    }
  }
};

__device__ __forceinline__ void write_row(const AttentionStatsQkArgs& args, const QkForm& form, const RowPlace& row,
                                          QkLane state, int keys, float first) {
  RowTotals total{};
  total.max_logit = state.max * form.scale;
  total.empty = state.max == -kInf && state.dot == state.dot;
  int columns = keys;
  if (args.sinks != nullptr) {
    first = args.sinks[row.head];
    if (first != -kInf) {
      ++columns;
      state.rebase(fmaxf(state.max, first), form.exponent);
      if (Centre::is_large(state.max, form.exponent)) state.template add<true, true>(first, form.exponent);
      else state.template add<true, false>(first, form.exponent);
      total.empty = false;
    }
  }
  const Centre centre = Centre::of(state.max, form.exponent);
  total.sum = state.sum, total.log_sum = logf(state.sum), total.dot = kLn2 * state.dot, total.square = state.square;
  total.centre = double(state.max) * form.scale - kLn2 * centre.distance(state.max, form.exponent);
  if (columns == 1) {  // exactly one-hot, as 2^x of a rounded reference is not
    total.square = total.sum * total.sum, total.dot = total.log_sum = 0.0;
    total.centre = double(state.max) * form.scale;
  }
  total.first = first == -kInf ? 0.f : exp2_approx(centre.distance(first, form.exponent));
  total.keys = row.inside ? static_cast<float>(keys) : NAN;
  total.broken = !row.inside || state.dot != state.dot || state.max == kInf;
  report(total, row.out, args.out);
}

}  // namespace inflection
