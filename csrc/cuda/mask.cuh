// One element of a mask.
#pragma once

#include "warp.cuh"

namespace inflection {

__device__ __forceinline__ float mask_value(const Mask& mask, int64_t at) {
  return for_dtype(mask.dtype, [&](auto zero) { return to_float(static_cast<const decltype(zero)*>(mask.data)[at]); });
}

// Whether the position is attended; `bias` is added to its score.
__device__ __forceinline__ bool attends(const Mask& mask, int64_t at, float& bias) {
  bias = 0.f;
  if (mask.dtype == DType::boolean) return static_cast<const uint8_t*>(mask.data)[at] != 0;
  bias = mask_value(mask, at);
  return !(bias <= mask.floor);
}

}  // namespace inflection
