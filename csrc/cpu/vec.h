// Vectors of float in the width of the instruction set that the including file is compiled for.
//
// GCC's and Clang's vector extensions, so that one source serves AVX-512, AVX2 and any other CPU. Included by every
// <isa>.cpp inside its own namespace INFLECTION_ISA, because inline functions compiled for different instruction sets
// must never be merged by the linker. No include guard against that: each <isa>.cpp includes it once.
#include "isa.h"

namespace inflection::INFLECTION_ISA {

#define IF_INLINE inline __attribute__((always_inline))

constexpr int W = INFLECTION_VECTOR_BYTES / 4;  // floats in a vector
typedef float vf __attribute__((vector_size(INFLECTION_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(INFLECTION_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(INFLECTION_VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(INFLECTION_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(INFLECTION_VECTOR_BYTES / 2)));  // W 16-bit numbers

IF_INLINE vf splat(float x) { return x - vf{}; }
IF_INLINE vu splat_u(uint32_t x) { return x + vu{}; }
IF_INLINE vf bits_to_float(vi x) { return (vf)x; }
IF_INLINE vi float_to_bits(vf x) { return (vi)x; }
IF_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
// One instruction each on x86. Where either is NaN the result is b: max(limit, x) keeps a NaN in x, max(x, limit) drops it.
IF_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
IF_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

// Sixteen bits to float, exactly. Half: shift mantissa and exponent into place, rescale by 2^112 (which also makes
// subnormals right), and put infinities and NaNs back, whose exponent the rescaling would have left finite.
IF_INLINE float bf16_to_float(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }
IF_INLINE float f16_to_float(uint16_t x) {
  const float magnitude = std::bit_cast<float>(uint32_t(x & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | uint32_t(x & 0x8000) << 16);
}

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

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
IF_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
IF_INLINE void store_u16(void* p, vu x) {
  const vh narrow = __builtin_convertvector(x, vh);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
// Rounds to the nearest, ties to even.
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

IF_INLINE float sum(vf x) {
  float lanes[W];
  store(lanes, x);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}
IF_INLINE float max(vf x) {
  float lanes[W];
  store(lanes, x);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
  return lanes[0];
}

// 2^x for x <= 0, relative error below 2e-7; 0 below -126, so never a subnormal. NaN stays NaN.
// x = n + f with |f| <= 1/2; 2^f by a minimax polynomial of degree 6; n goes into the exponent.
IF_INLINE vf exp2_nonpositive(vf x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits of the mantissa
  const vf shifted = x + kRound;
  const vf f = x - (shifted - kRound);
  vf y = splat(1.5353362e-4f);
  y = y * f + 1.3398874e-3f;
  y = y * f + 9.6184373e-3f;
  y = y * f + 5.5503324e-2f;
  y = y * f + 2.4022648e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  const vf result = (vf)((vi)y + ((vi)shifted << 23));
  return select(x < -126.0f, vf{}, result);
}

// A factor k > 0 of an exponent, as the two floats that k log2(e) needs: rounded to one, an entropy of 8192 keys would err
// by up to 6e-8 times the variance of its log-probabilities, which can be 20.
struct Exponent {
  vf high, low;
  vf floor;  // the arguments at which e^(k x) is 2^-60, far below half an ulp of any sum that holds a 1

  IF_INLINE explicit Exponent(float k) {
    const double exact = k * 1.4426950408889634;
    high = splat(static_cast<float>(exact));
    low = splat(static_cast<float>(exact - static_cast<float>(exact)));
    floor = splat(static_cast<float>(-60.0 / exact));
  }

  // e^(k x) for x in [floor, 0], relative error below 2e-7; exactly 1 at 0. Degree 5 leaves 9.3e-8 of it. The integer part
  // is found in the same rounding as the product, so that the fraction is exact with fused multiplication.
  IF_INLINE vf operator()(vf x) const {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits of the mantissa
    const vf shifted = x * high + kRound;
    const vf f = x * low + (x * high - (shifted - kRound));
    vf y = splat(0x1.5bda36p-10f);
    y = y * f + 0x1.3ce8aap-7f;
    y = y * f + 0x1.c6b6d8p-5f;
    y = y * f + 0x1.ebf9c2p-3f;
    y = y * f + 0x1.62e42ap-1f;
    y = y * f + 1.0f;
    return (vf)((vi)y + ((vi)shifted << 23));
  }
};

}  // namespace inflection::INFLECTION_ISA
