// A softmax row shared by the threads that read it: a state each (csrc/core/row_state.h), merged once at its end.
#pragma once

#include "exponential.cuh"
#include "kernels.h"

namespace inflection {

constexpr float kLowest = -3.402823466e38f;

// max(x, limit) keeps a NaN in x, as fmaxf does not.
__device__ __forceinline__ float at_least(float x, float limit) { return x < limit ? limit : x; }

struct RowLane {
  float max = -kInf;  // of unscaled values, as are the x that `dot` sums
  float sum = 0.f, dot = 0.f, square = 0.f;
  int keys = 0;

  // Adds N values at once, masked ones being -inf: one change of the maximum for all of them. `low` is what a score has
  // beyond its value, where there is an additive mask.
  template <int N, bool kLow>
  __device__ __forceinline__ void push(const float (&value)[N], const float (&low)[N], const Exponential& exponential) {
    float highest = max;
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, value[i]);
    rebase(highest, exponential);
    const float m = fmaxf(highest, kLowest);  // finite, or -inf - -inf would be NaN
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float x = value[i] - m;
      if (kLow) x += low[i];
      x = at_least(x, exponential.floor);
      const float e = exponential(x);
      const bool masked = value[i] == -kInf;  // at the floor of the exponent it would still count 2^-60
      keys += !masked;
      sum += masked ? 0.f : e;
      dot = fmaf(masked ? 0.f : e, x, dot);
      square = fmaf(masked ? 0.f : e, e, square);
    }
  }

  __device__ __forceinline__ void rebase(float highest, const Exponential& exponential) {
    if (highest == max) return;
    const float d = at_least(fmaxf(max, kLowest) - highest, exponential.floor), f = exponential(d);
    dot = f * (dot + d * sum);
    sum *= f;
    square *= f * f;
    max = highest;
  }
};

__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// One state of the lanes of a warp, in every lane.
__device__ __forceinline__ RowLane merge_warp(RowLane lane, const Exponential& exponential) {
  lane.rebase(warp_max(lane.max), exponential);
  lane.sum = warp_sum(lane.sum);
  lane.dot = warp_sum(lane.dot);
  lane.square = warp_sum(lane.square);
  lane.keys = warp_sum(lane.keys);
  return lane;
}

// Writes what is wanted of row `index`; `first` is the unscaled score of key 0, -inf where it is masked.
__device__ __forceinline__ void write_row(const RowLane& row, float first, float scale, const Exponential& exponential,
                                          int64_t index, const RowOutputs& out) {
  const bool broken = row.dot != row.dot, empty = !broken && row.keys == 0;
  const float log_sum = logf(row.sum);
  const float quotient = row.dot * scale / row.sum;
  const float remainder = fmaf(-quotient, row.sum, row.dot * scale) / row.sum;  // what the division rounded away
  const float entropy = (log_sum - quotient) - remainder;
  out.entropy[index] = empty ? 0.f : at_least(entropy, 0.f);
  out.lse[index] = empty ? -kInf : broken ? NAN : fmaf(row.max, scale, log_sum);
  if (out.keys == nullptr) return;
  const float p = first == -kInf ? 0.f : exponential(at_least(first - row.max, exponential.floor)) / row.sum;
  out.max_logit[index] = empty ? -kInf : broken ? NAN : row.max * scale;
  out.keys[index] = static_cast<float>(row.keys);
  out.collision[index] = empty ? 0.f : broken ? NAN : row.square / (row.sum * row.sum);
  out.sink[index] = empty ? 0.f : broken ? NAN : p;
}

}  // namespace inflection
