// Sums over the sampled positions of one head, for the mean of its rows and the variance of that mean.
//
// Position r stands for the stratum [r T / R, (r + 1) T / R) of T positions. With v the sequences in which it counts and
// y their entropy, the total is sum_r n_r y_r, n_r positions in stratum r. Its variance comes from neighbours (collapsed
// strata): the mean s_r^2 of (e_r - e_{r-1})^2 / 2 and (e_{r+1} - e_r)^2 / 2, as sum_r n_r^2 (1 - 1 / n_r) s_r^2, where
// e = y - mean * v is quadratic in a mean that is known later, hence sums of dy^2, dy dv and dv^2.
#pragma once

#include "core/moments.h"
#include "taps.h"

namespace INFLECTION_CORE {

IF_HD int64_t stratum_begin(int64_t r, int64_t rows, int64_t positions) { return r * positions / rows; }

IF_HD int64_t sampled_position(int64_t r, int64_t rows, int64_t positions, double draw) {
  const int64_t begin = stratum_begin(r, rows, positions), end = stratum_begin(r + 1, rows, positions);
  return begin + static_cast<int64_t>(draw * static_cast<double>(end - begin));
}

// What a squared difference of a stratum of n positions to each of its neighbours weighs; at the ends there is one.
IF_HD double difference_share(double n, bool at_end) { return n * (n - 1) / (at_end ? 2.0 : 4.0); }

struct TapSums {
  double rows = 0, entropy = 0, collision = 0, sink = 0;  // sums of n v, n y, ...
  double yy = 0, yv = 0, vv = 0;                          // weighted sums of dy dy, dy dv, dv dv
  float max_logit = -INFINITY;
};

// Of positions first, first + step, ... of a head, over the sequences in which they are tokens and attend some key.
// What other rows hold is not read: it may be NaN.
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
    sums.rows += n * v, sums.entropy += n * y, sums.collision += n * collision, sums.sink += n * sink;
    if (r == 0 || args.num_rows == args.queries) continue;
    double dv = v, dy = y;
    for (int64_t batch = 0; batch < args.batch; ++batch) {
      if (!counts(batch, r - 1)) continue;
      dv -= 1, dy -= args.stats.entropy[place(batch, r - 1)];
    }
    const double before = static_cast<double>(begin - stratum_begin(r - 1, args.num_rows, args.queries));
    const double weight = difference_share(before, r == 1) + difference_share(n, r + 1 == args.num_rows);
    sums.yy += weight * dy * dy, sums.yv += weight * dy * dv, sums.vv += weight * dv * dv;
  }
  return sums;
}

// A call replaces the sums of the one before, and counts: a reader knows whether there was exactly one.
IF_HD void write_tap_sums(const TapAttentionArgs& args, int64_t head, const TapSums& sums) {
  double* const out = args.sums + head;
  const int64_t pitch = args.pitch;
  out[0] += 1;
  out[1 * pitch] = sums.rows;
  out[2 * pitch] = sums.entropy;
  out[3 * pitch] = sums.collision;
  out[4 * pitch] = sums.sink;
  out[5 * pitch] = sums.yy;
  out[6 * pitch] = sums.yv;
  out[7 * pitch] = sums.vv;
  out[8 * pitch] = sums.max_logit;
}

}  // namespace INFLECTION_CORE
