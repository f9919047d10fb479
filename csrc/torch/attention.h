// What the operators of attention have in common: masks, broadcast without a copy, and the statistics of rows.
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

// One contiguous float32 for each of `count` rows; null without them.
inline const float* row_values(const MaybeTensor& tensor, const char* name, int64_t count) {
  if (!tensor) return nullptr;
  check_device(*tensor, name);
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && tensor->numel() == count,
                  name, ": expected one contiguous float32 value for each of the ", count, " rows");
  return const_data<float>(*tensor);
}

// What a backward pass gets of `count` rows: first what comes in, then what the forward pass reported.
inline RowGradients row_gradients(int64_t count, const MaybeTensor& grad_entropy, const MaybeTensor& grad_lse,
                                  const MaybeTensor& grad_collision, const MaybeTensor& grad_sink,
                                  const Tensor& entropy, const Tensor& lse, const Tensor& collision, const Tensor& sink,
                                  const MaybeTensor& lse_low) {
  return {.entropy = row_values(entropy, "entropy", count),
          .lse = row_values(lse, "lse", count),
          .lse_low = row_values(lse_low, "lse_low", count),
          .collision = grad_collision ? row_values(collision, "collision", count) : nullptr,
          .sink = grad_sink ? row_values(sink, "sink", count) : nullptr,
          .grad_entropy = row_values(grad_entropy, "grad_entropy", count),
          .grad_lse = row_values(grad_lse, "grad_lse", count),
          .grad_collision = row_values(grad_collision, "grad_collision", count),
          .grad_sink = row_values(grad_sink, "grad_sink", count)};
}

}  // namespace inflection
