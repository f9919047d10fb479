// 16-bit numbers as they are stored; dispatch by dtype; indices of a work item.
#pragma once

#include "core/host_device.h"
#include "kernels.h"

namespace INFLECTION_CORE {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Calls body(T{}) with the C++ type T of the dtype.
IF_CALLS_BACK template <class Body>
IF_HD decltype(auto) for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bf16: return body(BF16{});
    case DType::f16: return body(F16{});
    default: return body(float{});
  }
}

// Calls body(d, i) with the index i of item `item` in each dimension d; the last dimension is the fastest.
IF_CALLS_BACK template <class Body>
IF_HD void for_indices(int64_t item, const int64_t* sizes, int32_t dims, const Body& body) {
  for (int32_t d = dims - 1; d >= 0; --d) {
    body(d, item % sizes[d]);
    item /= sizes[d];
  }
}

}  // namespace INFLECTION_CORE
