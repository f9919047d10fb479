// Shared by the operators of CKA: features as kernel arguments, scratch memory, and work items for threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.h"

namespace inflection {

constexpr int64_t kSerialWork = 1 << 20;  // up to this number of multiplications one thread is faster than several

// Work items of unequal cost: each thread takes the next one. The result does not depend on which thread takes it. Calls
// work(item, thread).
template <class Work>
void parallel_items(int64_t items, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0}, arrived{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const int64_t thread = arrived++;
    for (int64_t item = next++; item < items; item = next++) work(item, thread);
  });
}

inline int64_t layers_of(const Tensor& features) {
  int64_t layers = 1;
  for (int64_t d = 0; d + 2 < features.dim(); ++d) layers *= features.size(d);
  return layers;
}

// Features [..., N, D] as a kernel argument; it points to `offsets`, the beginning of each layer.
inline CkaSide side_of(const Tensor& features, const char* name, std::vector<int64_t>& offsets) {
  check_device(features, name);
  STD_TORCH_CHECK(features.dim() >= 2, name, ": expected [..., N, D]");
  const int64_t last = features.dim() - 1;
  for (int64_t layer = 0; layer < layers_of(features); ++layer) {
    int64_t index = layer, offset = 0;
    for (int64_t d = last - 2; d >= 0; --d) {
      offset += index % features.size(d) * features.stride(d);
      index /= features.size(d);
    }
    offsets.push_back(offset);
  }
  const DType dtype = dtype_of(features, name);
  STD_TORCH_CHECK(dtype != DType::boolean, name, ": dtype must be float32, bfloat16 or float16");
  return {features.const_data_ptr(), offsets.data(),        features.size(last),
          features.stride(last - 1), features.stride(last), dtype};
}

inline Tensor scratch(const Tensor& like, int64_t numel, ScalarType dtype) {
  return new_tensor(like, {std::max<int64_t>(numel, 1)}, dtype);
}

}  // namespace inflection
