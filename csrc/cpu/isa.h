// One table of kernels per instruction set. <isa>.cpp fills its table; isa.cpp chooses one when the library is loaded.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "core/cka_rows.h"
#include "core/row_state.h"
#include "kernels.h"

namespace inflection {

struct CpuKernels {
  void (*sum_of_squares)(const SumOfSquaresArgs&, int64_t begin, int64_t end);
  void (*sum_of_squares_merge)(const SumOfSquaresArgs&, int64_t begin, int64_t end);
  void (*activation_moments)(const ActivationMomentsArgs&, int64_t begin, int64_t end);
  void (*activation_moments_merge)(const ActivationMomentsArgs&, int64_t begin, int64_t end);
  void (*attention_stats)(const AttentionStatsArgs&, int64_t begin, int64_t end);
  void (*attention_stats_backward)(const AttentionStatsBackwardArgs&, int64_t begin, int64_t end);
  int64_t (*attention_stats_qk_items)(const AttentionStatsQkArgs&);
  void (*attention_stats_qk)(const AttentionStatsQkArgs&, int64_t begin, int64_t end);
  int64_t (*attention_stats_qk_grad_query_items)(const AttentionStatsQkBackwardArgs&);
  void (*attention_stats_qk_grad_query)(const AttentionStatsQkBackwardArgs&, int64_t begin, int64_t end);
  int64_t (*attention_stats_qk_grad_key_items)(const AttentionStatsQkBackwardArgs&);
  void (*attention_stats_qk_grad_key)(const AttentionStatsQkBackwardArgs&, int64_t begin, int64_t end);
  int64_t (*attention_column_mass_items)(const AttentionColumnMassArgs&);
  void (*attention_column_mass)(const AttentionColumnMassArgs&, int64_t begin, int64_t end);
  void (*cka_rows)(const CkaPushArgs&, int64_t begin, int64_t end);
  void (*cka_shift)(const CkaPushArgs&, int64_t begin, int64_t end);
  void (*cka_pack)(const CkaPushArgs&, int64_t begin, int64_t end);
  void (*cka_long_rows)(const CkaPushArgs&, int64_t begin, int64_t end);
  void (*cka_product)(const CkaPushArgs&, int64_t begin, int64_t end);
  void (*cka_project)(const CkaProjectArgs&, int64_t begin, int64_t end);
  void (*cka_batch_triangles)(const CkaBatchArgs&, int64_t begin, int64_t end);
  void (*cka_batch_products)(const CkaBatchArgs&, int64_t begin, int64_t end);
  void (*cka_terms)(const CkaTermsArgs&, int64_t begin, int64_t end);
  void (*cka_terms_merge)(const CkaTermsArgs&, int64_t begin, int64_t end);
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace inflection
