// What a function of csrc/core is declared with: compiled for the host and for the device, and always inlined.
#pragma once

#ifdef __CUDACC__
#define IF_HD __host__ __device__ __forceinline__
#else
#define IF_HD inline __attribute__((always_inline))
#endif
