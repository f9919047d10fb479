// Reductions over the lanes of a warp, and the conversion of stored numbers.
#pragma once

#include "launch.cuh"

namespace inflection {

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// Over the threads of a block, the same in all of them; `partial` [kThreads / 32] in shared memory may be used again at
// once.
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

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BF16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
// Exact: the exponent is rescaled by 2^112, which also makes subnormals right; infinities and NaNs are put back.
__device__ __forceinline__ float to_float(F16 x) {
  const float magnitude = __uint_as_float(unsigned(x.bits & 0x7fff) << 13) * 0x1p112f;
  const unsigned special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return __uint_as_float(__float_as_uint(magnitude) | special | unsigned(x.bits & 0x8000) << 16);
}

// Stores a float; 16-bit numbers are rounded to the nearest, ties to even.
__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(BF16* out, float x) {
  const unsigned bits = __float_as_uint(x), rounded = bits + 0x7fffu + (bits >> 16 & 1);
  out->bits = static_cast<uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16);
}
__device__ __forceinline__ void put(F16* out, float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned half = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  if (magnitude < 0x38800000u) half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;  // subnormal
  if (magnitude >= 0x477ff000u) half = 0x7c00u;
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  out->bits = static_cast<uint16_t>(half | sign);
}

}  // namespace inflection
