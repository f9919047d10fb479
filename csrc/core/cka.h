// Linear CKA: the rows that are multiplied in float64, and the terms from the sums over the rows; see docs/math.md.
#pragma once

#include "core/host_device.h"
#include "kernels.h"

namespace INFLECTION_CORE {

constexpr int64_t kCkaExactRows = 32;     // up to this number of rows float64 costs no more than adding the Gram matrix
constexpr int64_t kCkaExactColumns = 16;  // of both sides: fewer columns do not average rounding errors

// A row is long, and not part of float32 sums, if |u|^2 is above this: 8 times the mean of its block. At most an eighth of
// the rows are long.
IF_HD double cka_long(double squares, double rows) { return 8.0 * squares / rows; }

// Whether products of two or three rows may leave the range of float32; `squares` is the sum of |u|^2 of a block. Its rows
// are then multiplied in float64.
IF_HD bool cka_leaves_float(double squares) { return squares != 0.0 && !(squares >= 0x1p-60 && squares <= 0x1p68); }

// Whether all rows of a block are multiplied in float64; p and q are sums of |u|^2 and |v|^2 over `columns` in total.
IF_HD bool cka_all_exact(double rows, int64_t columns, double p, double q) {
  return rows <= double(kCkaExactRows) || columns <= kCkaExactColumns || cka_leaves_float(p) || cka_leaves_float(q);
}

// Length of a float32 sum on the GPU, for this number of rows. It is shorter for few rows, because fewer sums then average
// their rounding errors: the error is proportional to sqrt(length) in one sum and to length / sqrt(rows) in all.
IF_HD int64_t cka_rows_at_once(int64_t rows) {
  return rows <= 128 ? 32 : rows <= 512 ? 64 : rows <= 2048 ? 128 : kCkaDepth;
}

// The sums from which the terms follow, by side (0: x, 1: y) and by term (0: xy, 1: xx, 2: yy).
struct CkaSums {
  double n;
  double norm[2];              // S_p, S_q
  double mean[2];              // |d|^2, d = s_u / n and s_v / n
  double of_p[2], of_q[2];     // d . w_p and d . w_q
  double square[3];            // S_pq, S_pp, S_qq
  double terms[kCkaTermSums];  // |S|_F^2 by term, then s^T M s by term
};

// The squared Frobenius norm of a centred product, or n (n - 3) HSIC_1 of Song et al. 2012, which is NaN for fewer than
// kCkaLeastRows rows. A self term as small as rounding errors is 0.
IF_HD double cka_term(const CkaSums& s, int term, bool debiased) {
  // Products have rounding errors of 1e-7 of the moments, so a smaller square in moments of the mean is noise.
  constexpr double kNoise = 1e-12;
  const int i = term == 2 ? 1 : 0, j = term == 1 ? 0 : 1;
  double out = s.terms[term];
  if (debiased) {
    const double dots = (i == 0 ? s.of_p[j] : s.of_q[j]) + (j == 0 ? s.of_p[i] : s.of_q[i]);
    const double kl = s.square[term] - 2.0 * dots + 4.0 * s.terms[3 + term] / (s.n * s.n) + s.mean[j] * s.norm[i] +
                      s.mean[i] * s.norm[j] - 3.0 * s.n * s.mean[i] * s.mean[j];
    const double total = (s.norm[i] - s.n * s.mean[i]) * (s.norm[j] - s.n * s.mean[j]);
    out += total / ((s.n - 1.0) * (s.n - 2.0)) - s.n / (s.n - 2.0) * kl;
    if (s.n < double(kCkaLeastRows)) out = NAN;
  }
  const double moment = s.n * s.mean[i];
  return term > 0 && out <= kNoise * moment * moment ? 0.0 : out;
}

}  // namespace INFLECTION_CORE
