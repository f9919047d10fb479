// A softmax row shared by several threads: each has its own state (csrc/core/row_state.h), merged once at the end.
#pragma once

#include "core/exact_sum.h"
#include "core/row_state.h"
#include "exponential.cuh"
#include "pairs.cuh"

namespace inflection {

constexpr float kLowest = -3.402823466e38f;

// Sums of e^x / Exponential::kLower over the columns of a slice that are below the maximum.
struct SliceSums {
  float below[2] = {}, dot[2] = {}, square = 0.f;

  __device__ __forceinline__ void add(int i, float x, float e) {
    below[i % 2] += e;
    dot[i % 2] = fmaf(e, x, dot[i % 2]);
    square = fmaf(e, e, square);
  }
};

// Columns at the maximum are counted, not summed, so that the sums of the others are accurate in nearly one-hot rows.
// Slices are added exactly, because rounding errors of thousands of equal terms do not average.
struct RowLane {
  float max = -kInf;                   // of unscaled values, as are the x that `dot` sums
  int tops = 0;                        // columns at the maximum
  float below = 0.f, below_low = 0.f;  // sum of e^x over the others, and its rounding error
  float dot = 0.f, dot_low = 0.f;
  float square = 0.f;  // over the others

  // Adds N values with one change of the maximum; masked ones are -inf. With an additive mask a score is value + low.
  template <int N, bool kLow>
  __device__ __forceinline__ void push(const float (&value)[N], const float (&low)[N], const Exponential& exponential) {
    float highest = max;
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, value[i]);
    rebase(highest, exponential);
    const float m = fmaxf(highest, kLowest);  // finite, or -inf - -inf would be NaN
    SliceSums sums;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float x = value[i] - m;
      if (kLow) x += low[i];
      x = at_least(x, exponential.floor);
      tops += x == 0.f;
      sums.add(i, x, x == 0.f ? 0.f : exponential.raised(x));
    }
    add(sums);
  }

  // The same for pairs of 16-bit numbers as they are stored; those at or below `floor` are masked. Returns false, and adds
  // nothing, if `push` has to look at each value: if one is NaN or +inf, or if the maximum is so close to `floor` that
  // masked values would count.
  template <class T, int N>
  __device__ __forceinline__ bool push_pairs(const uint32_t (&pair)[N], float floor, const Exponential& exponential) {
    uint32_t top = pair[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = larger<T>(top, pair[i]);
    top = larger<T>(top, swapped(top));
    const float here = front<T>(top), highest = max > here ? max : here;  // NaN where `here` is
    if (here <= floor) return true;
    if (!(highest > floor - exponential.floor && highest < kInf)) return false;
    rebase(highest, exponential);
    if (here != highest) top = kNanPair;  // compares unequal to every number
    uint32_t at_top = 0;
    SliceSums sums;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t is_top = equal(pair[i], top);  // false for bf16 above 2.6e36, which are summed like the others
      at_top -= is_top;
      const uint32_t others = (pair[i] & ~is_top) | (Infinity<T>::kMinusPair & is_top);
      const float x = fmaxf(front<T>(others) - highest, exponential.floor);
      const float y = fmaxf(back<T>(others) - highest, exponential.floor);
      sums.add(0, x, exponential.raised(x));
      sums.add(1, y, exponential.raised(y));
    }
    // A mask is -1 in front and -2^16 in the back half: at_top = (fronts - 2^16 fronts) + 2^16 backs.
    tops += (2 * (at_top & 0xffff) + (at_top >> 16)) & 0xffff;
    add(sums);
    return true;
  }

  __device__ __forceinline__ void rebase(float highest, const Exponential& exponential) {
    if (highest == max) return;
    const float d = at_least(fmaxf(max, kLowest) - highest, exponential.floor), f = exponential(d);
    const float count = static_cast<float>(tops);
    add_exactly(count, below, below_low);
    square += count;
    rebase_sums(d, f, below, dot, square);
    rebase_sums(d, f, below_low, dot_low);
    tops = 0;
    max = highest;
  }

 private:
  __device__ __forceinline__ void add(const SliceSums& sums) {
    add_exactly((sums.below[0] + sums.below[1]) * Exponential::kLower, below, below_low);
    add_exactly((sums.dot[0] + sums.dot[1]) * Exponential::kLower, dot, dot_low);
    square += sums.square * (Exponential::kLower * Exponential::kLower);
  }
};

// The merged state of a warp or of a block. In float64: entropy is a difference of two numbers of up to 9.
struct MergedRow {
  float max = -kInf;
  int tops = 0;
  double below = 0.0, dot = 0.0;
  float square = 0.f;

  static __device__ __forceinline__ MergedRow of(const RowLane& lane) {
    return {lane.max, lane.tops, double(lane.below) + lane.below_low, double(lane.dot) + lane.dot_low, lane.square};
  }
  __device__ __forceinline__ void rebase(float highest, const Exponential& exponential) {
    if (highest == max) return;
    const float d = at_least(fmaxf(max, kLowest) - highest, exponential.floor);
    below += tops;
    square += static_cast<float>(tops);
    rebase_sums(double(d), double(exponential(d)), below, dot, square);
    tops = 0;
    max = highest;
  }
  __device__ __forceinline__ void merge(MergedRow other, const Exponential& exponential) {
    const float highest = fmaxf(max, other.max);
    rebase(highest, exponential);
    other.rebase(highest, exponential);
    tops += other.tops;
    below += other.below;
    dot += other.dot;
    square += other.square;
  }
};

// The merged state of the lanes of a warp, in all lanes.
__device__ __forceinline__ MergedRow merge_warp(MergedRow row, const Exponential& exponential) {
  row.rebase(warp_max(row.max), exponential);
  row.tops = warp_sum(row.tops);
  row.below = warp_sum(row.below);
  row.dot = warp_sum(row.dot);
  row.square = warp_sum(row.square);
  return row;
}

// The merged state of a row that was split into `count` parts, in all lanes of a warp.
__device__ __forceinline__ MergedRow merge_parts(const RowPart* parts, int64_t count, const Exponential& exponential,
                                                 int& keys) {
  MergedRow row;
  keys = 0;
  for (int64_t i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    const RowPart& part = parts[i];
    row.merge({part.max, part.tops, part.below, part.dot, part.square}, exponential);
    keys += part.keys;
  }
  keys = warp_sum(keys);
  return merge_warp(row, exponential);
}

// Writes the requested results of row `index`; `first` is the unscaled score of key 0, -inf if it is masked.
__device__ __forceinline__ void write_row(const MergedRow& row, int keys, double first, double scale,
                                          const Exponential& exponential, int64_t index, const RowOutputs& out) {
  const bool broken = row.dot != row.dot, empty = !broken && row.max == -kInf;
  const double beyond = row.below + (row.tops - 1), top = row.max * scale;
  const float d = static_cast<float>(first - row.max);
  const double at_first = d > exponential.floor ? exponential(d) : 0.f, square = double(row.square) + row.tops;
  report({top, beyond + 1.0, log1p(beyond), row.dot * scale, square, at_first, top, float(keys), empty, broken}, index,
         out);
}

}  // namespace inflection
