// Shared by the operators of attention: masks, broadcast without a copy, and statistics of rows.
#pragma once

#include "dispatch.h"

namespace inflection {

inline float lowest(DType dtype) {
  return dtype == DType::f16 ? -65504.f : dtype == DType::bf16 ? -0x1.fep127f : -0x1.fffffep127f;
}

// Strides of `mask` broadcast to [sizes...], right-aligned; 0 in broadcast dimensions. Writes `dims` entries.
inline void broadcast_strides(const Tensor& mask, const int64_t* sizes, int64_t dims, int64_t* strides) {
  STD_TORCH_CHECK(mask.dim() <= dims, "attn_mask: has ", mask.dim(), " dimensions, the scores have ", dims);
  const int64_t missing = dims - mask.dim();
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = d < missing ? 1 : mask.size(d - missing);
    STD_TORCH_CHECK(size == 1 || size == sizes[d], "attn_mask: does not broadcast to the scores in dimension ", d);
    strides[d] = size == 1 ? 0 : mask.stride(d - missing);
  }
}

// A mask without its strides. No mask: data is null.
inline Mask mask_of(const MaybeTensor& tensor, const Tensor& like) {
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

// Arguments of a backward pass over `count` rows: incoming gradients, and statistics of the forward pass.
inline RowGradients row_gradients(int64_t count, const MaybeTensor& grad_entropy, const MaybeTensor& grad_lse,
                                  const MaybeTensor& grad_collision, const MaybeTensor& grad_sink,
                                  const Tensor& entropy, const Tensor& lse, const Tensor& collision, const Tensor& sink,
                                  const MaybeTensor& lse_low) {
  const auto values = [count](const MaybeTensor& tensor, const char* name) {
    return tensor ? elements<const float>(*tensor, name, count) : nullptr;
  };
  return {.entropy = values(entropy, "entropy"),
          .lse = values(lse, "lse"),
          .lse_low = values(lse_low, "lse_low"),
          .collision = grad_collision ? values(collision, "collision") : nullptr,
          .sink = grad_sink ? values(sink, "sink") : nullptr,
          .grad_entropy = values(grad_entropy, "grad_entropy"),
          .grad_lse = values(grad_lse, "grad_lse"),
          .grad_collision = values(grad_collision, "grad_collision"),
          .grad_sink = values(grad_sink, "grad_sink")};
}

}  // namespace inflection
