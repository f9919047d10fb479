// Sums of floats, or of vectors of floats, that keep their rounding errors.
#pragma once

#include "core/host_device.h"

namespace INFLECTION_CORE {

// The exact rounding error of total = a + b (Knuth's two-sum).
template <class V>
IF_HD V lost_in_sum(V a, V b, V total) {
  const V from_b = total - a, from_a = total - from_b;
  return (a - from_a) + (b - from_b);
}

// sum += x; the rounding error is added to `low`.
template <class V>
IF_HD void add_exactly(V x, V& sum, V& low) {
  const V before = sum;
  sum += x;
  low += lost_in_sum(before, x, sum);
}

}  // namespace INFLECTION_CORE
