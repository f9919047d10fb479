// How a kernel is launched and finds its shared memory: the only two things that differ under emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace inflection {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef INFLECTION_EMULATION

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
           const Arguments&... arguments) {
  emulator::launch(grid, block, shared_bytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
template <class T>
T& shared() {
  return *static_cast<T*>(emulator::shared_memory());
}
inline int multiprocessors() { return emulator::kMultiprocessors; }
inline bool is_hopper() { return true; }

#else

constexpr size_t kSharedWithoutAsking = 48 << 10;  // a block that wants more has to say so before the launch

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
// The block's dynamic shared memory: a struct that holds everything the block shares. Static shared variables are not
// used, so that the emulation sees every byte of it.
template <class T>
__device__ __forceinline__ T& shared() {
  extern __shared__ __align__(1024) unsigned char inflection_shared_memory[];
  return *reinterpret_cast<T*>(inflection_shared_memory);
}
// Of the current device; 0 where there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline bool is_hopper() { return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

#endif

}  // namespace inflection
