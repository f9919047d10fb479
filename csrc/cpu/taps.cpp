// The kernels of taps: one version for all CPUs, because they take little time.
#include "isa.h"

#define INFLECTION_ISA portable
#define INFLECTION_VECTOR_BYTES 16
#include "tap_attention.inc"
#include "tap_gradient.inc"
