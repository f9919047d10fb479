// One row of scores from Q and K: the sums of one of the lanes that share it, and its results.
#pragma once

#include "core/row_state.h"
#include "qk_tiles.cuh"

namespace inflection {

constexpr float kLeastExponent = -127.f;   // 2^x is 0 below
constexpr float kMostReference = 0x1p20f;  // a smaller rounded reference is within 2^-5 of the maximum

// The centre of the sums of a row, in base 2: x = (score - base) * exponent - reference. A small rounded product can
// replace the maximum: the sums are exact with respect to it, and x takes one instruction. With a large one, x could be
// far above 0, so the maximum is subtracted first.
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

// The sums of one lane over its part of a row.
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
  // kAll: whether the sum of squares is needed. kPolynomials of 16 exponentials are polynomials. kTogether: all lanes of
  // the warp call this and take the same branch, whatever their maxima are.
  template <bool kAll, int kPolynomials = 0, bool kTogether = false, int N>
  __device__ __forceinline__ void push(const float (&score)[N], float exponent) {
    float highest = max;
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, score[i]);
    rebase(highest, exponent);
    QkLane part{max, reference};  // starts at zero: short sums have smaller rounding errors
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
  // Merges the lanes that share a row; all of them get the result.
  __device__ __forceinline__ void merge_lanes(float exponent) {
    rebase(warp_max<kLanesPerRow>(max), exponent);
    sum = warp_sum<kLanesPerRow>(sum);
    dot = warp_sum<kLanesPerRow>(dot);
    square = warp_sum<kLanesPerRow>(square);
  }
};

// Merges the lanes of a row and writes its results: `keys` attended by this lane, `first` the score of the key that
// `sink` reports, in the lane that has it, else -inf.
__device__ __forceinline__ void write_row(const AttentionStatsQkArgs& args, const QkForm& form, const RowPlace& row,
                                          QkLane state, int keys, float first) {
  state.merge_lanes(form.exponent);
  keys = warp_sum<kLanesPerRow>(keys);
  first = warp_max<kLanesPerRow>(first);
  if (threadIdx.x % kLanesPerRow != 0 || !row.exists) return;
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
  if (columns == 1) {  // one-hot: exact values, because 2^x of a rounded reference is not exactly 1
    total.square = total.sum * total.sum, total.dot = total.log_sum = 0.0;
    total.centre = double(state.max) * form.scale;
  }
  total.first = first == -kInf ? 0.f : exp2_approx(centre.distance(first, form.exponent));
  total.keys = row.inside ? static_cast<float>(keys) : NAN;
  total.broken = !row.inside || state.dot != state.dot || state.max == kInf;
  report(total, row.out, args.out);
}

}  // namespace inflection
