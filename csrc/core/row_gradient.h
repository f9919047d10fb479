// The gradient of the statistics of one softmax row with respect to its scores.
//
//   d(loss)/d(score) = p (g_lse - g_entropy (log p + H) + 2 g_collision (p - C) - g_sink P),  log p = score - lse,
//
// and g_sink P more at the column whose probability P is.
#pragma once

#include "core/host_device.h"
#include "kernels.h"

namespace INFLECTION_CORE {

struct RowGradient {
  float constant, slope, curve;  // p (constant + slope log p + curve p)
  float first;                   // what comes to that at the column that `sink` reports

  // Of row `at`, times `factor`. A row without keys depends on nothing: 0. An infinite gradient that comes in makes every
  // attended column NaN. `sink_is_key`: not where it is a column without a key.
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

  // At a column with this probability, not that of `first`: a number, or a vector of columns.
  template <class V>
  IF_HD V at(V p, V log_p) const {
    return p * (log_p * slope + (p * curve + constant));
  }
};

}  // namespace INFLECTION_CORE
