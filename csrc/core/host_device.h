// What the maths of csrc/core is declared with: for host and device, always inlined.
#pragma once

#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define IF_HD __host__ __device__ __forceinline__
#define IF_CALLS_BACK \
  _Pragma("nv_exec_check_disable")  // before a template that calls what it is given: of its own kind
#else
#define IF_HD inline __attribute__((always_inline))
#define IF_CALLS_BACK
#endif

// Every instruction set of the CPU kernels has the maths in its own namespace: the linker must not merge functions that
// were compiled for different ones, and their templates are instantiated with its vectors.
#ifdef INFLECTION_ISA
#define INFLECTION_CORE inflection::INFLECTION_ISA
#else
#define INFLECTION_CORE inflection
#endif
