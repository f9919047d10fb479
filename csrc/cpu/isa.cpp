// Chooses the kernels for this CPU and forwards every CPU launcher of kernels.h to them.
#include "isa.h"

#include <atomic>

namespace inflection {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#if defined(INFLECTION_LOWERED_AVX512)
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

std::atomic<Isa> current{best()};

const CpuKernels& kernels() {
  switch (current.load(std::memory_order_relaxed)) {
#if defined(__x86_64__)
    case Isa::avx512: return kAvx512Kernels;
    case Isa::avx2: return kAvx2Kernels;
#endif
    default: return kPortableKernels;
  }
}

}  // namespace

int cpu_isa(int64_t limit) {
  if (limit >= 0) {
    const int64_t have = static_cast<int64_t>(best());
    current = static_cast<Isa>(limit < have ? limit : have);
  }
  return static_cast<int>(current.load());
}

void sum_of_squares_cpu(const SumOfSquaresArgs& args, int64_t begin, int64_t end) {
  kernels().sum_of_squares(args, begin, end);
}
void sum_of_squares_merge_cpu(const SumOfSquaresArgs& args, int64_t begin, int64_t end) {
  kernels().sum_of_squares_merge(args, begin, end);
}
void activation_moments_cpu(const ActivationMomentsArgs& args, int64_t begin, int64_t end) {
  kernels().activation_moments(args, begin, end);
}
void activation_moments_merge_cpu(const ActivationMomentsArgs& args, int64_t begin, int64_t end) {
  kernels().activation_moments_merge(args, begin, end);
}
void attention_stats_cpu(const AttentionStatsArgs& args, int64_t begin, int64_t end) {
  kernels().attention_stats(args, begin, end);
}
void attention_stats_backward_cpu(const AttentionStatsBackwardArgs& args, int64_t begin, int64_t end) {
  kernels().attention_stats_backward(args, begin, end);
}
void cka_rows_cpu(const CkaPushArgs& args, int64_t begin, int64_t end) { kernels().cka_rows(args, begin, end); }
void cka_shift_cpu(const CkaPushArgs& args, int64_t begin, int64_t end) { kernels().cka_shift(args, begin, end); }
void cka_pack_cpu(const CkaPushArgs& args, int64_t begin, int64_t end) { kernels().cka_pack(args, begin, end); }
void cka_long_rows_cpu(const CkaPushArgs& args, int64_t begin, int64_t end) {
  kernels().cka_long_rows(args, begin, end);
}
void cka_product_cpu(const CkaPushArgs& args, int64_t begin, int64_t end) { kernels().cka_product(args, begin, end); }
void cka_project_cpu(const CkaProjectArgs& args, int64_t begin, int64_t end) {
  kernels().cka_project(args, begin, end);
}
void cka_batch_triangles_cpu(const CkaBatchArgs& args, int64_t begin, int64_t end) {
  kernels().cka_batch_triangles(args, begin, end);
}
void cka_batch_products_cpu(const CkaBatchArgs& args, int64_t begin, int64_t end) {
  kernels().cka_batch_products(args, begin, end);
}
void cka_terms_cpu(const CkaTermsArgs& args, int64_t begin, int64_t end) { kernels().cka_terms(args, begin, end); }
void cka_terms_merge_cpu(const CkaTermsArgs& args, int64_t begin, int64_t end) {
  kernels().cka_terms_merge(args, begin, end);
}

int64_t attention_stats_qk_items(const AttentionStatsQkArgs& args) { return kernels().attention_stats_qk_items(args); }
void attention_stats_qk_cpu(const AttentionStatsQkArgs& args, int64_t begin, int64_t end) {
  kernels().attention_stats_qk(args, begin, end);
}
int64_t attention_stats_qk_grad_query_items(const AttentionStatsQkBackwardArgs& args) {
  return kernels().attention_stats_qk_grad_query_items(args);
}
void attention_stats_qk_grad_query_cpu(const AttentionStatsQkBackwardArgs& args, int64_t begin, int64_t end) {
  kernels().attention_stats_qk_grad_query(args, begin, end);
}
int64_t attention_stats_qk_grad_key_items(const AttentionStatsQkBackwardArgs& args) {
  return kernels().attention_stats_qk_grad_key_items(args);
}
void attention_stats_qk_grad_key_cpu(const AttentionStatsQkBackwardArgs& args, int64_t begin, int64_t end) {
  kernels().attention_stats_qk_grad_key(args, begin, end);
}

int64_t attention_column_mass_items(const AttentionColumnMassArgs& args) {
  return kernels().attention_column_mass_items(args);
}
void attention_column_mass_cpu(const AttentionColumnMassArgs& args, int64_t begin, int64_t end) {
  kernels().attention_column_mass(args, begin, end);
}

}  // namespace inflection
