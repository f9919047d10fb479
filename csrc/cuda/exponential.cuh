// e^(k x) on the GPU: the hardware's 2^x of an exponent with a small rounding error.
#pragma once

#include <math.h>

#include "warp.cuh"

namespace inflection {

constexpr float kInf = INFINITY;
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.693147180559945309;

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef INFLECTION_EMULATION
  return emulator::exp2_approx(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // relative error 2^-22, exactly 1 at 0
  return y;
#endif
}

// The same as a polynomial, in nine instructions, for -127 <= x < 2^7: relative error below 2e-7 above -126, exactly 1 at 0
// and 0 at -127. The result for NaN may be a number.
__device__ __forceinline__ float exp2_polynomial(float x) {
  const float shifted = x + kRound, f = x - (shifted - kRound);
  constexpr float a = kExp2Series[0], b = kExp2Series[1], c = kExp2Series[2], d = kExp2Series[3], e = kExp2Series[4];
  const float y = fmaf(fmaf(fmaf(fmaf(fmaf(a, f, b), f, c), f, d), f, e), f, 1.f);
  return __uint_as_float(__float_as_uint(y) + (__float_as_uint(shifted) << 23));
}

// max(x, limit), but unlike fmaxf it returns NaN for NaN.
__device__ __forceinline__ float at_least(float x, float limit) { return x < limit ? limit : x; }

// k log2(e) as two floats, see Exponent in csrc/cpu/vec.h: with one, the entropy of a long row would err by more than 1e-6.
struct Exponential {
  // kRaise is added to the exponent by the multiply-add that forms it. The rounding error of the exponent is then smallest
  // about 8 nats below the maximum, where thousands of columns can have the mass of the maximum and errors count most.
  static constexpr float kRaise = 12.f, kLower = 0x1p-12f;

  float high, low;
  float floor;  // here e^(k x) is 2^-60, far below half an ulp of any sum that contains a 1

  static Exponential of(double k) {
    const double exact = k * kLog2e;
    const float high = static_cast<float>(exact);
    return {high, static_cast<float>(exact - high), static_cast<float>(-60.0 / exact)};
  }
  __device__ __forceinline__ float operator()(float x) const { return raised(x) * kLower; }  // x in [floor, 0]
  __device__ __forceinline__ float raised(float x) const {                                   // e^(k x) / kLower
    return exp2_approx(fmaf(x, low, fmaf(x, high, kRaise)));
  }
};

}  // namespace inflection
