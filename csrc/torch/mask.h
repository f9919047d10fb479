// How a mask becomes strides: broadcast without a copy.
#pragma once

#include "dispatch.h"

namespace inflection {

inline float lowest(DType dtype) {
  return dtype == DType::f16 ? -65504.f : dtype == DType::bf16 ? -0x1.fep127f : -0x1.fffffep127f;
}

// Strides of `mask` broadcast to [sizes...], right-aligned; 0 where it is broadcast. `dims` entries are written.
inline void broadcast_strides(const Tensor& mask, const int64_t* sizes, int64_t dims, int64_t* strides) {
  STD_TORCH_CHECK(mask.dim() <= dims, "attn_mask: has ", mask.dim(), " dimensions, the scores have ", dims);
  const int64_t missing = dims - mask.dim();
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = d < missing ? 1 : mask.size(d - missing);
    STD_TORCH_CHECK(size == 1 || size == sizes[d], "attn_mask: does not broadcast to the scores in dimension ", d);
    strides[d] = size == 1 ? 0 : mask.stride(d - missing);
  }
}

// Everything of a mask but its strides. No mask: data is null.
inline Mask mask_of(const std::optional<Tensor>& tensor, const Tensor& like) {
  Mask mask{};
  if (tensor) {
    check_device(*tensor, "attn_mask");
    STD_TORCH_CHECK(tensor->get_device() == like.get_device(), "attn_mask: is on another device");
    mask.data = tensor->const_data_ptr();
    mask.dtype = dtype_of(*tensor, "attn_mask");
    mask.floor = lowest(mask.dtype) / 2;
  }
  return mask;
}

}  // namespace inflection
