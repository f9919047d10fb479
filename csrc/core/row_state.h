// Statistics of one softmax row in one pass and O(1) memory; host and device.
//
//   m = max s,  x = s - m,  l = sum e^x,  t = sum e^x x,  c = sum e^2x,  n = number of keys
//   entropy = log l - t / l,  log-sum-exp = m + log l,  collision = c / l^2
//
// x is the difference of two floats, so it is exact near the maximum and exactly 0 at it, whatever the size of the
// scores: l >= 1, t <= 0, both terms of the entropy are >= 0 and nothing cancels. Peaked rows are as exact as flat ones.
#pragma once

#include <math.h>

#include "core/host_device.h"

namespace inflection {

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

  // Rebase both onto the larger maximum: e^(s - m) = e^(s - m_i) f with d = m_i - m, f = e^d, so
  // l = sum f l_i, t = sum f (t_i + d l_i), c = sum f^2 c_i.
  IF_HD void merge(const RowState& other) {
    first = other.first > first ? other.first : first;  // at most one side has seen the column
    keys += other.keys;
    if (other.sum == 0.f) return;  // both empty: -inf - -inf would be NaN
    if (sum == 0.f) {
      max = other.max, sum = other.sum, dot = other.dot, square = other.square;
      return;
    }
    const float m = other.max > max ? other.max : max;
    rebase(m);
    const float d = difference(other.max, m), f = expf(d);
    sum += f * other.sum;
    dot += f * (other.dot + d * other.sum);
    square += f * f * other.square;
  }

  IF_HD void rebase(float m) {
    const float d = difference(max, m), f = expf(d);
    dot = f * (dot + d * sum);
    sum *= f;
    square *= f * f;
    max = m;
  }

  // a - b; of finite numbers it may be -inf, and 0 * -inf would be NaN. e^kLeast is 0.
  static IF_HD float difference(float a, float b) {
    constexpr float kLeast = -200.f;
    const float d = a - b;
    return d < kLeast ? kLeast : d;
  }
  // Roundings may take a probability over 1. NaN stays NaN.
  static IF_HD float probability(float p) { return p > 1.f ? 1.f : p; }

  // A row without keys has entropy 0, log-sum-exp -inf, collision 0 and sink 0.
  IF_HD float entropy() const { return entropy_of(logf(sum)); }
  IF_HD float entropy_of(float log_sum) const { return sum == 0.f ? 0.f : log_sum - dot / sum; }
  IF_HD float lse() const { return sum == 0.f ? -INFINITY : max + logf(sum); }
  // The log-sum-exp rounded, and what it lost: without that e^(score - lse) is off by 6e-8 |lse|. Knuth's exact sum.
  IF_HD void lse_of(float log_sum, float& high, float& low) const {
    high = max + log_sum;
    const float from_log = high - max, from_max = high - from_log;
    low = (max - from_max) + (log_sum - from_log);
    if (sum == 0.f) high = -INFINITY, low = 0.f;
  }
  IF_HD float collision() const { return sum == 0.f ? 0.f : probability(square / (sum * sum)); }
  IF_HD float sink() const { return sum == 0.f ? 0.f : probability(expf(first - max) / sum); }
};

}  // namespace inflection
