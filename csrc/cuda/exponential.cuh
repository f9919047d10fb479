// e^(k x) on the GPU: the hardware's 2^x, corrected for what rounding k x log2(e) to one float loses.
#pragma once

#include <math.h>

#include "warp.cuh"

namespace inflection {

constexpr float kInf = INFINITY;
constexpr float kLn2 = 0.693147181f;

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef INFLECTION_EMULATION
  return emulator::exp2_approx(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // relative error 2^-22, exactly 1 at 0
  return y;
#endif
}

// max(x, limit) keeps a NaN in x, as fmaxf does not.
__device__ __forceinline__ float at_least(float x, float limit) { return x < limit ? limit : x; }

// See Exponent in csrc/cpu/vec.h: k log2(e) as two floats, or the entropy of a long row would err by more than 1e-6.
struct Exponential {
  float high, low;
  float floor;  // where e^(k x) is 2^-60: far below half an ulp of any sum that holds a 1

  static Exponential of(double k) {
    const double exact = k * 1.4426950408889634;
    const float high = static_cast<float>(exact);
    return {high, static_cast<float>(exact - high), static_cast<float>(-60.0 / exact)};
  }
  __device__ __forceinline__ float operator()(float x) const {  // x in [floor, 0]
    const float product = x * high, rest = fmaf(x, high, -product) + x * low;
    const float y = exp2_approx(product);
    return fmaf(y, rest * kLn2, y);
  }
};

}  // namespace inflection
