// Reductions over the lanes of a warp, and conversions of stored numbers.
#pragma once

#include "core/dtypes.h"
#include "core/exp2.h"
#include "launch.cuh"

namespace inflection {

// combine(a, b) over groups of kLanes neighbouring lanes; all of them get the result.
template <int kLanes = kWarpSize, class T, class Combine>
__device__ __forceinline__ T warp_reduce(T x, const Combine& combine) {
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

template <int kLanes = kWarpSize, class T>
__device__ __forceinline__ T warp_sum(T x) {
  return warp_reduce<kLanes>(x, [](T a, T b) { return a + b; });
}

template <int kLanes = kWarpSize>
__device__ __forceinline__ float warp_max(float x) {
  return warp_reduce<kLanes>(x, [](float a, float b) { return fmaxf(a, b); });
}

// Sum over the threads of a block; all of them get it. `partial` [kThreads / 32] in shared memory can be reused at once.
template <int kThreads>
__device__ __forceinline__ double block_sum(double x, double* partial) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) total += partial[warp];
  return total;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BF16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
__device__ __forceinline__ float to_float(F16 x) {
#ifdef INFLECTION_EMULATION
  return emulator::float_of_f16(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// Stores a float; 16-bit numbers are rounded to the nearest, ties to even.
__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(BF16* out, float x) {
#ifdef INFLECTION_EMULATION
  out->bits = emulator::bf16_of_float(x);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#endif
}
__device__ __forceinline__ void put(F16* out, float x) {
#ifdef INFLECTION_EMULATION
  out->bits = emulator::f16_of_float(x);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#endif
}

}  // namespace inflection
