// Copies of boxes of a tensor into shared memory by the tensor memory accelerator (TMA): the host creates a descriptor of
// the tensor, one thread issues the instruction. There is a second version for the emulator. sm_90.
//
// A box is stored in rows of 128 bytes. 16-byte pieces are swizzled within each eight rows, so that eight rows at one
// column lie in different banks: bits 4 to 6 of an address are XORed with bits 7 to 9. Elements outside the tensor are
// written as 0, and their bytes count at the barrier.
#pragma once

#include "barrier.cuh"

#ifndef INFLECTION_EMULATION
#include <cuda.h>
#endif

namespace inflection {

constexpr int kSwizzledRow = 128;                    // bytes per row of a box
constexpr int kSwizzleAlign = 1024;                  // alignment of a box in shared memory
constexpr int kTensorDims = 4;                       // dimensions of all tensors
constexpr uint64_t kMostStride = uint64_t{1} << 40;  // bytes

// A tensor, innermost dimension first, which is contiguous; strides of the other dimensions in bytes, multiples of 16. A
// box has `box` 16-bit numbers in each dimension, kSwizzledRow bytes in the innermost.
struct TensorShape {
  const void* data;
  uint64_t sizes[kTensorDims], strides[kTensorDims - 1];
  uint32_t box[kTensorDims];
};

#ifdef INFLECTION_EMULATION

using TensorMap = emulator::TensorMap;
inline int describe(const TensorShape& shape, TensorMap& map) {
  return emulator::describe_tensor(map, shape.data, kTensorDims, shape.sizes, shape.strides, shape.box);
}
inline void copy_box(void* to, const TensorMap& map, int x, int y, int z, int w, Barrier& barrier) {
  emulator::copy_box(to, map, {x, y, z, w}, &barrier.bits);
}

#else

using TensorMap = CUtensorMap;

// Looked up at run time, so that the library does not link to the driver, which machines without a GPU do not have.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    return reinterpret_cast<Encode>(status == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  return encode;
}
// Creates the descriptor; returns a cudaError_t as int.
inline int describe(const TensorShape& shape, TensorMap& map) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const uint32_t steps[kTensorDims] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kTensorDims, const_cast<void*>(shape.data), shape.sizes,
             shape.strides, shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
// Copies the box whose first number is at (x, y, z, w), innermost first; its bytes arrive at the barrier.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int x, int y, int z, int w, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

#endif

}  // namespace inflection
