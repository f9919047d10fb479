// Cross term and self terms of linear CKA from the Gram matrix of z = (1, p, q, u, v), in float64; see docs/math.md.
//
// A block takes kCkaTermRows rows of a layer's matrix; another launch adds their sums in order, so the result is
// deterministic. Bound by memory: the upper triangle is read once.
#include "core/cka.h"
#include "warp.cuh"

namespace inflection {
namespace {

constexpr int kThreads = 256;
constexpr size_t kSumsMemory = sizeof(double) * kThreads / kWarpSize;

// A block per item: kCkaTermRows rows of the Gram matrix.
__global__ void __launch_bounds__(kThreads) sum_terms(CkaTermsArgs args, int64_t items) {
  double* const memory = &shared<double>();
  const int64_t dims = args.dim_x + args.dim_y, k = kCkaHead + dims, item = blockIdx.x;
  const double* gram = args.gram + item / items * cka_packed(k);
  const double n = gram[0];
  const double* s = gram + kCkaHead;  // [dims]: the row of 1 holds s_u, s_v
  const int64_t first = item % items * kCkaTermRows, last = first + kCkaTermRows < dims ? first + kCkaTermRows : dims;
  double sums[kCkaTermSums] = {};
  for (int64_t a = first; a < last; ++a) {
    const double* m = gram + cka_row(k, kCkaHead + a) + kCkaHead;  // m[b] is element (a, b) of the moments
    const bool left = a < args.dim_x;
    for (int64_t b = a + threadIdx.x; b < dims; b += kThreads) {
      const bool cross = left && b >= args.dim_x;
      const double centred = m[b] - s[a] * s[b] / n, twice = cross || b == a ? 1.0 : 2.0;
      const double square = twice * centred * centred, product = twice * s[a] * m[b] * s[b];
      if (cross) sums[0] += square, sums[3] += product;
      else if (left) sums[1] += square, sums[4] += product;
      else sums[2] += square, sums[5] += product;
    }
  }
#pragma unroll
  for (int i = 0; i < kCkaTermSums; ++i) {
    const double total = block_sum<kThreads>(sums[i], memory);
    if (threadIdx.x == 0) args.partial[item * kCkaTermSums + i] = total;
  }
}

// A block per layer.
__global__ void __launch_bounds__(kThreads) merge_terms(CkaTermsArgs args, int64_t items) {
  double* const memory = &shared<double>();
  const int64_t dims = args.dim_x + args.dim_y, k = kCkaHead + dims, layer = blockIdx.x;
  const double* gram = args.gram + layer * cka_packed(k);
  const double n = gram[0], *s = gram + kCkaHead;
  CkaSums sums{n, {gram[1], gram[2]}, {}, {}, {}, {gram[k + 1], gram[k], gram[2 * k - 1]}, {}};
#pragma unroll
  for (int i = 0; i < kCkaTermSums; ++i) {
    double total = 0.0;
#pragma unroll 1  // or the compiler keeps the loads of several sums at once, and spills for sm_100
    for (int64_t item = threadIdx.x; item < items; item += kThreads)
      total += args.partial[(layer * items + item) * kCkaTermSums + i];
    sums.terms[i] = block_sum<kThreads>(total, memory);
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    double mean = 0.0, of_p = 0.0, of_q = 0.0;
    for (int64_t j = (side ? args.dim_x : 0) + threadIdx.x; j < (side ? dims : args.dim_x); j += kThreads) {
      const double d = s[j] / n;
      mean += d * d;
      of_p += d * gram[k + 2 + j];
      of_q += d * gram[2 * k + j];
    }
    sums.mean[side] = block_sum<kThreads>(mean, memory);
    sums.of_p[side] = block_sum<kThreads>(of_p, memory);
    sums.of_q[side] = block_sum<kThreads>(of_q, memory);
  }
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int t = 0; t < 3; ++t) args.terms[layer * 3 + t] = cka_term(sums, t, args.debiased);
}

}  // namespace

int cka_terms_cuda(const CkaTermsArgs& args, void* stream) {
  const int64_t items = cka_term_items(args.dim_x, args.dim_y), blocks = args.layers * items;
  if (blocks == 0) return cudaSuccess;
  return launch(sum_terms, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kSumsMemory, stream, args, items);
}

int cka_terms_merge_cuda(const CkaTermsArgs& args, void* stream) {
  const int64_t items = cka_term_items(args.dim_x, args.dim_y);
  const dim3 grid(static_cast<unsigned>(args.layers));
  if (args.layers == 0) return cudaSuccess;
  return launch(merge_terms, grid, dim3(kThreads), kSumsMemory, stream, args, items);
}

}  // namespace inflection
