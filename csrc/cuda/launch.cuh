// Launch of a kernel and access to its shared memory, with a second version for the emulator.
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

constexpr size_t kDefaultShared = 48 << 10;  // a kernel that needs more must set an attribute before the launch

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  if (shared_bytes > kDefaultShared) {
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
// The dynamic shared memory of a block as one struct. There are no static shared variables, so that the emulator sees all
// of the shared memory.
template <class T>
__device__ __forceinline__ T& shared() {
  extern __shared__ __align__(1024) unsigned char inflection_shared_memory[];
  return *reinterpret_cast<T*>(inflection_shared_memory);
}
// An attribute of the current device; 0 without a device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline bool is_hopper() { return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

#endif

}  // namespace inflection
