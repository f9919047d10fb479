// The kernels for any CPU: 16-byte vectors, which are SSE2 on x86-64 and NEON on AArch64.
#include "isa.h"

#define INFLECTION_ISA portable
#define INFLECTION_TABLE kPortableKernels
#define INFLECTION_VECTOR_BYTES 16
#include "kernels.inc"
