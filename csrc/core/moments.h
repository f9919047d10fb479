// What activation_moments takes of one row, from its sums; and which of its activations are massive.
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

// The larger one; NaN where one of the two is.
IF_HD float larger_or_nan(float a, float b) { return a != a || a > b ? a : b; }

// The magnitude from which an activation of the row is massive if it is above kMassiveMagnitude; NaN where none can be.
// at_most(x) counts the magnitudes up to x. The lower median is the least number that half of the row reaches, found bit
// by bit: magnitudes are ordered like their bits.
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

// add(k, number) for the MomentSum k of the row. `massive` is their number, NaN where the row holds NaN; `both`: there is
// an x.
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
  if (row.input == 0.0) return;  // an input of zeros has neither a length to compare with nor a direction
  add(kMomentPairs, 1.0);
  add(kMomentRatio, sqrt(row.change / row.input));
  if (row.second == 0.0) return;
  add(kMomentCosines, 1.0);
  add(kMomentCosine, row.product / sqrt(row.input) / sqrt(row.second));
}

}  // namespace INFLECTION_CORE
