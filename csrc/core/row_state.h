// Statistics of one softmax row in one pass and O(1) memory: sums, their rebasing to another maximum, and results.
//
//   m = max s,  x = s - m,  l = sum e^x,  t = sum e^x x,  c = sum e^2x,  n = number of keys
//   entropy = log l - t / l,  log-sum-exp = m + log l,  collision = c / l^2
//
// x is the difference of two floats, so it is exact near the maximum and exactly 0 at it, for scores of any size: l >= 1,
// t <= 0, both terms of the entropy are >= 0 and nothing cancels. Peaked rows are as accurate as flat ones.
#pragma once

#include "core/host_device.h"
#include "kernels.h"

namespace INFLECTION_CORE {

// Rebases sums from centre m to centre m - d, with f = e^d: l <- f l, t <- f (t + d l), c <- f^2 c. For numbers or vectors;
// d and t in the same unit.
template <class V>
IF_HD void rebase_sums(V d, V f, V& sum, V& dot) {
  dot = f * (dot + d * sum);
  sum = f * sum;
}
template <class V, class S>
IF_HD void rebase_sums(V d, V f, V& sum, V& dot, S& square) {
  rebase_sums(d, f, sum, dot);
  square = static_cast<S>(f * f) * square;
}

// Limits a rounded probability to 1. NaN stays NaN.
IF_HD double probability(double p) { return p > 1.0 ? 1.0 : p; }

// The total sums of one row. In float64: entropy is a difference of two numbers of up to 9.
struct RowTotals {
  double centre;     // of the sums: m, or near it
  double sum;        // l
  double log_sum;    // log l
  double dot;        // t, in nats
  double square;     // c
  double first;      // e^(s - centre) of the column that `sink` reports; 0 if it is not attended
  double max_logit;  // largest score of a key
  float keys;
  bool empty;   // no attended column
  bool broken;  // NaN or +inf at an attended column
};

// Writes the requested results of row `at`.
IF_HD void report(const RowTotals& row, int64_t at, const RowOutputs& out) {
  const auto put = [&](float* to, double value, double when_empty) {
    if (to != nullptr) to[at] = static_cast<float>(row.broken ? double(NAN) : row.empty ? when_empty : value);
  };
  const double inverse = 1.0 / row.sum;  // one division a row
  const double entropy = row.log_sum - row.dot * inverse, lse = row.centre + row.log_sum;
  put(out.entropy, entropy > 0.0 ? entropy : 0.0, 0.0);
  put(out.lse, lse, -INFINITY);
  // Without it e^(score - lse) has a relative error of 6e-8 |lse|.
  if (out.lse_low != nullptr)
    out.lse_low[at] = row.broken || row.empty ? 0.f : static_cast<float>(lse - static_cast<float>(lse));
  put(out.max_logit, row.max_logit, -INFINITY);
  put(out.collision, probability(row.square * inverse * inverse), 0.0);
  put(out.sink, probability(row.first * inverse), 0.0);
  if (out.keys != nullptr) out.keys[at] = row.keys;
}

struct RowState {
  float max = -INFINITY;    // m
  float sum = 0.f;          // l
  float dot = 0.f;          // t
  float square = 0.f;       // c
  float keys = 0.f;         // n
  float first = -INFINITY;  // score of the column that `sink` reports

  // A score of -inf is no key. NaN and +inf make every statistic of the row NaN, as they make its softmax.
  IF_HD void push(float score) {
    if (score == -INFINITY) return;
    RowState one;
    one.max = score;
    one.sum = 1.f;
    one.square = 1.f;
    one.keys = 1.f;
    merge(one);
  }

  IF_HD void merge(RowState other) {
    first = other.first > first ? other.first : first;  // at most one side has seen the column
    keys += other.keys;
    const float highest = other.max > max ? other.max : max;
    rebase(highest);
    other.rebase(highest);
    sum += other.sum;
    dot += other.dot;
    square += other.square;
  }

  IF_HD void rebase(float highest) {
    constexpr float kLeast =
        -200.f;        // e^kLeast is 0. The difference of finite numbers may be -inf, and 0 * -inf is NaN.
    if (sum == 0.f) {  // -inf - -inf would be NaN
      max = highest;
      return;
    }
    const float d = max - highest < kLeast ? kLeast : max - highest;
    rebase_sums(d, expf(d), sum, dot, square);
    max = highest;
  }

  IF_HD RowTotals totals() const {
    const bool broken = !(sum >= 0.f) || !(max < INFINITY);
    return {max, sum, logf(sum), dot, square, expf(first - max), max, keys, sum == 0.f, broken};
  }
};

}  // namespace INFLECTION_CORE
