// cpu_isa: which instruction set the CPU kernels use; tests lower it to run every version of them.
#include "dispatch.h"

#ifdef INFLECTION_CPU_KERNELS
namespace inflection {
namespace {
int64_t cpu_isa_op(int64_t limit) { return cpu_isa(limit); }
}  // namespace

INFLECTION_SCHEMAS(m) { m.def("cpu_isa(int limit) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(inflection_fast, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa_op)); }

}  // namespace inflection
#endif
