// Sums over the sampled positions of one head, for the mean entropy of its rows and the variance of that mean.
//
// Row r is sampled from the stratum [r T / R, (r + 1) T / R) of n_r of the T positions. Let v_r be the number of sequences
// in which it counts, and y_r the sum of their entropies. The mean is sum_r n_r y_r / sum_r n_r v_r. Its variance is
// estimated from neighbours (collapsed strata): sum_r n_r^2 (1 - 1 / n_r) s_r^2, with s_r^2 the mean of
// (e_r - e_{r-1})^2 / 2 and (e_{r+1} - e_r)^2 / 2, and e = y - mean * v. The mean is known only later, so sums of dy^2,
// dy dv and dv^2 are kept.
#pragma once

#include "core/moments.h"
#include "taps.h"

namespace INFLECTION_CORE {

IF_HD int64_t stratum_begin(int64_t r, int64_t rows, int64_t positions) { return r * positions / rows; }

IF_HD int64_t sampled_position(int64_t r, int64_t rows, int64_t positions, double draw) {
  const int64_t begin = stratum_begin(r, rows, positions), end = stratum_begin(r + 1, rows, positions);
  return begin + static_cast<int64_t>(draw * static_cast<double>(end - begin));
}

// Weight of the squared difference between a stratum of n positions and a neighbour; strata at the ends have only one.
IF_HD double difference_weight(double n, bool at_end) { return n * (n - 1) / (at_end ? 2.0 : 4.0); }

// Sums of n v, n y and so on; weighted sums of dy dy, dy dv, dv dv.
enum TapSum { kTapRows, kTapEntropy, kTapCollision, kTapSink, kTapYY, kTapYV, kTapVV, kTapTotals };
static_assert(kTapTotals + 2 == kTapSums);  // and calls, largest logit

struct TapSums {
  double totals[kTapTotals] = {};
  float max_logit = -INFINITY;
};

// Sums over rows first, first + step, ... of a head and over the sequences in which they are tokens and attend some key.
// Other rows are not read, because they may hold NaN.
IF_HD TapSums tap_sums(const TapAttentionArgs& args, int64_t head, int64_t first, int64_t step) {
  const auto place = [&](int64_t batch, int64_t r) { return (batch * args.heads + head) * args.num_rows + r; };
  const auto counts = [&](int64_t batch, int64_t r) {
    const int64_t position = args.positions ? args.positions[r] : r;
    const bool token = !args.tokens || args.tokens[batch * args.token_strides[0] + position * args.token_strides[1]];
    return token && args.stats.keys[place(batch, r)] != 0.f;
  };
  TapSums sums;
  for (int64_t r = first; r < args.num_rows; r += step) {
    double v = 0, y = 0, collision = 0, sink = 0;
    for (int64_t batch = 0; batch < args.batch; ++batch) {
      if (!counts(batch, r)) continue;
      const int64_t at = place(batch, r);
      v += 1, y += args.stats.entropy[at], collision += args.stats.collision[at], sink += args.stats.sink[at];
      sums.max_logit = larger_or_nan(sums.max_logit, args.stats.max_logit[at]);
    }
    const int64_t begin = stratum_begin(r, args.num_rows, args.queries);
    const double n = static_cast<double>(stratum_begin(r + 1, args.num_rows, args.queries) - begin);
    sums.totals[kTapRows] += n * v, sums.totals[kTapEntropy] += n * y;
    sums.totals[kTapCollision] += n * collision, sums.totals[kTapSink] += n * sink;
    if (r == 0 || args.num_rows == args.queries) continue;
    double dv = v, dy = y;
    for (int64_t batch = 0; batch < args.batch; ++batch) {
      if (!counts(batch, r - 1)) continue;
      dv -= 1, dy -= args.stats.entropy[place(batch, r - 1)];
    }
    const double before = static_cast<double>(begin - stratum_begin(r - 1, args.num_rows, args.queries));
    const double weight = difference_weight(before, r == 1) + difference_weight(n, r + 1 == args.num_rows);
    sums.totals[kTapYY] += weight * dy * dy, sums.totals[kTapYV] += weight * dy * dv;
    sums.totals[kTapVV] += weight * dv * dv;
  }
  return sums;
}

// Replaces the sums of the previous call, and counts calls, so that a reader can check that there was exactly one.
IF_HD void write_tap_sums(const TapAttentionArgs& args, int64_t head, const TapSums& sums) {
  double* const out = args.sums + head;
  out[0] += 1;
  for (int i = 0; i < kTapTotals; ++i) out[(1 + i) * args.pitch] = sums.totals[i];
  out[(1 + kTapTotals) * args.pitch] = sums.max_logit;
}

}  // namespace INFLECTION_CORE
