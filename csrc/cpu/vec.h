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
IF_INLINE vf bits_to_float(vi x) { return (vf)x; }
IF_INLINE vi float_to_bits(vf x) { return (vi)x; }
IF_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
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

// The first n < W elements; the other lanes are `fill`.
template <class T>
IF_INLINE vf load_part(const T* p, int64_t n, float fill) {
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
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

}  // namespace inflection::INFLECTION_ISA
