// The gradient of the statistics of one softmax row with respect to its scores.
//
//   d(loss)/d(score) = p (g_lse - g_entropy (log p + H) + 2 g_collision (p - C) - g_sink P),  log p = score - lse,
//
// plus g_sink P at the column whose probability is P.
#pragma once

#include "core/host_device.h"
#include "kernels.h"

namespace INFLECTION_CORE {

struct RowGradient {
  float constant, slope, curve;  // p (constant + slope log p + curve p)
  float first;                   // added at the column that `sink` reports

  // The gradient of row `at`, times `factor`; 0 for a row without keys. An infinite incoming gradient makes all attended
  // columns NaN. `sink_is_key`: whether the column that `sink` reports has a key.
  static IF_HD RowGradient of(const RowGradients& rows, int64_t at, float factor, bool sink_is_key) {
    RowGradient row{0.f, 0.f, 0.f, 0.f};
    if (rows.lse[at] == -INFINITY) return row;
    if (rows.grad_lse != nullptr) row.constant = rows.grad_lse[at] * factor;
    if (rows.grad_entropy != nullptr) {
      row.slope = -rows.grad_entropy[at] * factor;
      row.constant += row.slope * rows.entropy[at];
    }
    if (rows.grad_collision != nullptr) {
      row.curve = 2.f * rows.grad_collision[at] * factor;
      row.constant -= row.curve * rows.collision[at];
    }
    if (rows.grad_sink != nullptr) {
      const float share = rows.grad_sink[at] * factor * rows.sink[at];
      row.constant -= share;
      if (sink_is_key) row.first = share;
    }
    const float all = row.constant + row.slope + row.curve + row.first;
    if (all - all != 0.f) row.constant = NAN;
    return row;
  }

  // The gradient, without `first`, at a column with probability p; V is a number or a vector of columns.
  template <class V>
  IF_HD V at(V p, V log_p) const {
    return p * (log_p * slope + (p * curve + constant));
  }
};

}  // namespace INFLECTION_CORE
