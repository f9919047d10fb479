// Declarations of the functions of csrc/core: for host and device, always inlined.
#pragma once

#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define IF_HD __host__ __device__ __forceinline__
#define IF_CALLS_BACK _Pragma("nv_exec_check_disable")  // before a template that calls a host or a device function
#else
#define IF_HD inline __attribute__((always_inline))
#define IF_CALLS_BACK
#endif

// Each instruction set of the CPU kernels has its own namespace, because the linker must not merge functions that were
// compiled for different ones.
#ifdef INFLECTION_ISA
#define INFLECTION_CORE inflection::INFLECTION_ISA
#else
#define INFLECTION_CORE inflection
#endif
