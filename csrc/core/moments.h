// The contribution of one row to activation_moments, and the limit of its massive activations.
#pragma once

#include "core/host_device.h"
#include "kernels.h"

namespace INFLECTION_CORE {

IF_HD float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

// max(a, b); NaN if either is NaN.
IF_HD float larger_or_nan(float a, float b) { return a != a || a > b ? a : b; }

// kMassiveOfMedian times the lower median of the magnitudes; NaN if no activation can be massive. at_most(x) counts the
// magnitudes up to x. The median is found by bisection over the bits, as magnitudes are ordered like their bits.
IF_CALLS_BACK template <class AtMost>
IF_HD double massive_limit(int64_t dim, float largest, const AtMost& at_most) {
  const int64_t half = (dim + 1) / 2;
  if (at_most(static_cast<float>(largest / kMassiveOfMedian)) < half) return NAN;
  uint32_t low = 0, high = 0x7f800000;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (at_most(float_of_bits(middle)) >= half) high = middle;
    else low = middle + 1;
  }
  return float_of_bits(low) * kMassiveOfMedian;
}

// Sums over one row: y and its powers; x^2, x y and (y - x)^2.
struct RowMoments {
  double first, second, third, fourth, input, product, change;
};

// Calls add(k, number) for each MomentSum k of the row. `massive`: number of massive activations, NaN if the row has NaN;
// `both`: whether there is an x.
IF_CALLS_BACK template <class Add>
IF_HD void add_row(const RowMoments& row, int64_t dim, double massive, bool both, const Add& add) {
  add(kMomentRows, 1.0);
  add(kMomentElements, static_cast<double>(dim));
  add(kMomentFirst, row.first);
  add(kMomentSecond, row.second);
  add(kMomentThird, row.third);
  add(kMomentFourth, row.fourth);
  add(kMomentMassive, massive);
  if (!both) return;
  add(kMomentInput, row.input);
  if (row.input == 0.0) return;  // ratio and cosine are not defined for an input of zeros
  add(kMomentPairs, 1.0);
  add(kMomentRatio, sqrt(row.change / row.input));
  if (row.second == 0.0) return;
  add(kMomentCosines, 1.0);
  add(kMomentCosine, row.product / sqrt(row.input) / sqrt(row.second));
}

}  // namespace INFLECTION_CORE
