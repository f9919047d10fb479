// The kernels for CPUs with AVX2 and FMA: 32-byte vectors.
#if defined(__x86_64__)
#include "isa.h"

// After all standard headers, whose functions must run on any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif

#define INFLECTION_ISA avx2
#define INFLECTION_TABLE kAvx2Kernels
#define INFLECTION_VECTOR_BYTES 32
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
