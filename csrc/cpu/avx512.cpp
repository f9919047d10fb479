// The kernels for CPUs with AVX-512: 64-byte vectors.
#if defined(__x86_64__)
#include "isa.h"

// After all standard headers, whose functions must run on any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#elif defined(INFLECTION_LOWERED_AVX512)  // `make test-wide`: the same vectors on a CPU without AVX-512, as pairs
#pragma GCC target("arch=x86-64-v3")
#else
#pragma GCC target("arch=x86-64-v4")
#endif

#define INFLECTION_ISA avx512
#define INFLECTION_TABLE kAvx512Kernels
#define INFLECTION_VECTOR_BYTES 64
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
