// One table of kernels per instruction set. <isa>.cpp fills its table; isa.cpp chooses one when the library is loaded.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels.h"

namespace inflection {

struct CpuKernels {
  void (*sum_of_squares)(const SumOfSquaresArgs&, int64_t begin, int64_t end);
  void (*sum_of_squares_merge)(const SumOfSquaresArgs&, int64_t begin, int64_t end);
  void (*attention_stats)(const AttentionStatsArgs&, int64_t begin, int64_t end);
  void (*attention_stats_backward)(const AttentionStatsBackwardArgs&, int64_t begin, int64_t end);
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace inflection
