// Vectors of floats in the width of the instruction set of the including file.
//
// Uses vector extensions of GCC and Clang, so that one source serves AVX-512, AVX2 and other CPUs. Each <isa>.cpp has its
// own namespace, because the linker must not merge inline functions that were compiled for different instruction sets.
#pragma once

#include "isa.h"

#include "core/dtypes.h"
#include "core/exp2.h"

namespace inflection::INFLECTION_ISA {

#define IF_INLINE inline __attribute__((always_inline))
#define IF_LAMBDA __attribute__((always_inline))  // behind the parameters of a lambda

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

IF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
IF_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
IF_INLINE int64_t round_up(int64_t a, int64_t step) { return ceil_div(a, step) * step; }

constexpr int W = INFLECTION_VECTOR_BYTES / 4;  // floats in a vector
typedef float vf __attribute__((vector_size(INFLECTION_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(INFLECTION_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(INFLECTION_VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(INFLECTION_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(INFLECTION_VECTOR_BYTES / 2)));  // W 16-bit numbers

IF_INLINE vf splat(float x) { return x - vf{}; }
IF_INLINE vu splat_u(uint32_t x) { return x + vu{}; }
IF_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
// One instruction each on x86. If either is NaN the result is b: max(limit, x) keeps NaN in x, max(x, limit) drops it.
IF_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
IF_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

// Exact conversions to float. float16: shifts mantissa and exponent, rescales by 2^112 (correct for subnormals, too), and
// restores the exponent of infinities and NaNs, which the rescaling makes finite.
IF_INLINE float bf16_to_float(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }
IF_INLINE float f16_to_float(uint16_t x) {
  const float magnitude = std::bit_cast<float>(uint32_t(x & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | uint32_t(x & 0x8000) << 16);
}

IF_INLINE float to_float(float x) { return x; }
IF_INLINE float to_float(BF16 x) { return bf16_to_float(x.bits); }
IF_INLINE float to_float(F16 x) { return f16_to_float(x.bits); }

IF_INLINE vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
IF_INLINE vu load_u16(const void* p) {
  vh x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vu);
}
IF_INLINE vf load(const BF16* p) { return (vf)(load_u16(p) << 16); }
IF_INLINE vf load(const F16* p) {
  const vu x = load_u16(p);
  const vf magnitude = (vf)((x & 0x7fff) << 13) * 0x1p112f;
  const vu special = (vu)((x & 0x7c00) == 0x7c00) & 0x7f800000u;
  return (vf)((vu)magnitude | special | (x & 0x8000) << 16);
}
IF_INLINE vd load(const double* p) {
  vd x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
IF_INLINE void store(double* p, vd x) { __builtin_memcpy(p, &x, sizeof x); }
IF_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
IF_INLINE void store_u16(void* p, vu x) {
  const vh narrow = __builtin_convertvector(x, vh);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
// Rounds to nearest, ties to even.
IF_INLINE void store(BF16* p, vf x) {
  const vu bits = (vu)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  store_u16(p, (vu)(x == x ? (vi)(rounded >> 16) : (vi)(bits >> 16 | 0x40)));
}
IF_INLINE void store(F16* p, vf x) {
  const vu bits = (vu)x, sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const vu normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  const vu small = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;  // 0.5 has the ulp of a subnormal half
  vu half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? splat_u(0x7c00) : half;
  half = magnitude > 0x7f800000u ? splat_u(0x7e00) : half;
  store_u16(p, half | sign);
}

// The first n < W elements; the other lanes are `fill`.
template <class T>
IF_INLINE vf load_part(const T* p, int64_t n, float fill) {
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}

// The first n < W lanes.
template <class T>
IF_INLINE void store_part(T* p, int64_t n, vf x) {
  T lanes[W];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// Combines all lanes: halves of the vector until four lanes are left.
template <int N>
struct Floats {
  typedef float type __attribute__((vector_size(4 * N)));
};
template <int N, class Combine>
IF_INLINE float across(typename Floats<N>::type x, Combine combine) {
  if constexpr (N == 4) {
    return combine(combine(x[0], x[1]), combine(x[2], x[3]));
  } else {
    typename Floats<N / 2>::type a, b;
    __builtin_memcpy(&a, &x, sizeof a);
    __builtin_memcpy(&b, reinterpret_cast<const char*>(&x) + sizeof a, sizeof b);
    return across<N / 2>(combine(a, b), combine);
  }
}
struct Plus {
  template <class T>
  IF_INLINE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {
  template <class T>
  IF_INLINE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
IF_INLINE float sum(vf x) { return across<W>(x, Plus{}); }
IF_INLINE float max(vf x) { return across<W>(x, Larger{}); }

// The halves of a vector in float64; and their sum.
IF_INLINE void widen(vf x, vd& low, vd& high) {
  typename Floats<W / 2>::type a, b;
  __builtin_memcpy(&a, &x, sizeof a);
  __builtin_memcpy(&b, reinterpret_cast<const char*>(&x) + sizeof a, sizeof b);
  low = __builtin_convertvector(a, vd), high = __builtin_convertvector(b, vd);
}
IF_INLINE vd widened(vf x) {
  vd low, high;
  widen(x, low, high);
  return low + high;
}
// p[0], p[1], ... += x
IF_INLINE void add_to_double(double* p, vf x) {
  typename Floats<W / 2>::type part[2];  // one copy: with two, GCC keeps accumulators in memory
  __builtin_memcpy(part, &x, sizeof x);
  for (int h = 0; h < 2; ++h) store(p + h * (W / 2), load(p + h * (W / 2)) + __builtin_convertvector(part[h], vd));
}

// The sum of the lanes.
IF_INLINE double sum(vd x) {
  double total = 0.0;
  for (int lane = 0; lane < W / 2; ++lane) total += x[lane];
  return total;
}
IF_INLINE double wide_sum(vf x) { return sum(widened(x)); }

// Sums of adjacent pairs of a, then of b.
template <int... I>
IF_INLINE vd pair_sums(vd a, vd b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}
// Lane i of the result is the sum of the lanes of rows[i], for W / 2 rows.
template <int N>
IF_INLINE vd row_sums(const vd* rows) {
  if constexpr (N == 1) {
    return rows[0];
  } else {
    return pair_sums(row_sums<N / 2>(rows), row_sums<N / 2>(rows + N / 2), std::make_integer_sequence<int, W / 2>{});
  }
}

// log(1 + x) for x >= 0, absolute error below 2e-9, relative where x is small. 1 + x = 2^k (1 + z), s = z / (2 + z),
// log(1 + z) = 2 (s + s^3 / 3 + ...) with |s| < 0.172.
IF_INLINE vd log1p_nonnegative(vd x) {
  typedef uint64_t vul __attribute__((vector_size(INFLECTION_VECTOR_BYTES)));
  constexpr uint64_t kHalfRoot = 0x3fe6a09e667f3bcd, kExponent = 0x4330000000000000;  // sqrt(1/2); 2^52
  const vd whole = x + 1.0;
  const vul k = ((vul)whole - kHalfRoot) >> 52;
  const vd scaled = (vd)((vul)whole - (k << 52));
  const vd z = k == 0 ? x : scaled - 1.0;
  const vd s = z / (z + 2.0), q = s * s;
  const vd series = s * (2.0 + q * (2.0 / 3 + q * (2.0 / 5 + q * (2.0 / 7 + q * (2.0 / 9)))));
  return series + ((vd)(k | kExponent) - 0x1p52) * 0.6931471805599453;
}

// 2^(n + f) for |f| <= 1/2; `shifted` is n + kRound. N vectors at a time, because the dependency chain of one vector is too
// long for out-of-order execution.
template <int N>
IF_INLINE void exp2_parts(const vf (&shifted)[N], const vf (&f)[N], vf (&y)[N]) {
  for (int i = 0; i < N; ++i) y[i] = splat(kExp2Series[0]);
  for (int k = 1; k < 6; ++k) {
    for (int i = 0; i < N; ++i) y[i] = y[i] * f[i] + kExp2Series[k];
  }
  for (int i = 0; i < N; ++i) y[i] = (vf)((vu)y[i] + ((vu)shifted[i] << 23));  // out of range it wraps round
}
IF_INLINE vf exp2_parts(vf shifted, vf f) {
  const vf shifteds[1] = {shifted}, fs[1] = {f};
  vf y[1];
  exp2_parts(shifteds, fs, y);
  return y[0];
}

// 2^x for -127 <= x <= 0, relative error below 2e-7 above -126; exactly 0 at -127. NaN stays NaN.
IF_INLINE vf exp2_clamped(vf x) {
  const vf shifted = x + kRound;
  return exp2_parts(shifted, x - (shifted - kRound));
}

// 2^x for x <= 0, relative error below 2e-7; 0 below -126, so never a subnormal. NaN stays NaN.
IF_INLINE vf exp2_nonpositive(vf x) { return select(x < -126.0f, vf{}, exp2_clamped(x)); }

// A factor k > 0 of an exponent, k log2(e), as two floats: rounded to one, it would change an entropy of 8192 keys by up to
// 6e-8 times the variance of its log-probabilities, which can be 20.
struct Exponent {
  vf high, low;
  vf floor;    // the argument where e^(k x) is 2^-60, far below half an ulp of any sum that contains a 1
  bool split;  // whether `low` is needed

  IF_INLINE explicit Exponent(double k) {
    const double exact = k * 1.4426950408889634;
    high = splat(static_cast<float>(exact));
    low = splat(static_cast<float>(exact - static_cast<float>(exact)));
    floor = splat(static_cast<float>(-60.0 / exact));
    split = std::fabs(exact - static_cast<float>(exact)) > 2e-8 * exact;
  }

  // e^(k x) for x in [floor, 0], relative error below 2e-7; exactly 1 at 0. One rounding forms the product and its integer
  // part, so that the fraction is exact with fused multiply-add.
  template <bool kSplit, int N>
  IF_INLINE void apply(const vf (&x)[N], vf (&y)[N]) const {
    vf shifted[N], f[N];
    for (int i = 0; i < N; ++i) shifted[i] = x[i] * high + kRound;
    for (int i = 0; i < N; ++i) f[i] = x[i] * high - (shifted[i] - kRound);
    for (int i = 0; kSplit && i < N; ++i) f[i] = x[i] * low + f[i];
    exp2_parts(shifted, f, y);
  }
  IF_INLINE vf operator()(vf x) const {
    const vf in[1] = {x};
    vf out[1];
    apply<true>(in, out);
    return out[0];
  }
};

}  // namespace inflection::INFLECTION_ISA
