// Selects the kernels for this CPU; the CPU launchers of kernels.h call them.
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

#define INFLECTION_LAUNCHER(name, Args) \
  void name##_cpu(const Args& args, int64_t begin, int64_t end) { kernels().name(args, begin, end); }
#define INFLECTION_ITEMS(name, Args) \
  int64_t name##_items(const Args& args) { return kernels().name##_items(args); }
INFLECTION_KERNEL_LIST(INFLECTION_LAUNCHER)
INFLECTION_ITEMS_LIST(INFLECTION_ITEMS)

}  // namespace inflection
