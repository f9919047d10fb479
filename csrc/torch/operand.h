// Converts a tensor of any size and layout into an operand of sum_of_squares.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "dispatch.h"

namespace inflection {

// Sorts the dimensions by stride and merges contiguous ones, because the order of a sum does not matter.
inline Operand operand_of(const Tensor& tensor, const char* name, int32_t group) {
  Operand op{tensor.const_data_ptr(), {1}, {1}, tensor.numel(), 1, dtype_of(tensor, name), group};
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int32_t n = 0;
  for (const auto& [stride, size] : dims) {
    if (n > 0 && stride == op.strides[n - 1] * op.sizes[n - 1]) {
      op.sizes[n - 1] *= size;
      continue;
    }
    STD_TORCH_CHECK(n < kMaxDims, name, ": more than ", kMaxDims, " dimensions that cannot be merged");
    op.strides[n] = stride;
    op.sizes[n++] = size;
  }
  op.dims = std::max(n, 1);
  return op;
}

}  // namespace inflection
