// One table of kernels per instruction set, filled by <isa>.cpp; isa.cpp selects one when the library is loaded.
// Includes all standard headers of the kernels. <isa>.cpp includes this file before it sets its instruction set, because
// functions of standard headers must run on any CPU.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "kernels.h"

namespace inflection {

struct CpuKernels {
#define INFLECTION_FIELD(name, Args) void (*name)(const Args&, int64_t begin, int64_t end);
#define INFLECTION_ITEMS_FIELD(name, Args) int64_t (*name##_items)(const Args&);
  INFLECTION_KERNEL_LIST(INFLECTION_FIELD)
  INFLECTION_ITEMS_LIST(INFLECTION_ITEMS_FIELD)
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace inflection
