// tap_gradient: adds the squared norm of a gradient to a slot if a flag is set.
#include "operand.h"
#include "tap.h"

namespace inflection {
namespace {

void tap_gradient(Tensor gradient, Tensor flag, Tensor slots, int64_t slot) {
  const int32_t* const is_up = flag_of(flag, gradient);
  if (is_down(is_up)) return;
  check_device(gradient, "gradient");
  const Operand operand = operand_of(gradient, "gradient", 0);
  STD_TORCH_CHECK(operand.dtype != DType::boolean, "gradient: dtype must be float32, bfloat16 or float16");
  const int64_t chunks = ceil_div(operand.numel, kSquaresChunk), first_chunk[] = {0, chunks};
  const Tensor partial = new_double(gradient, {chunks});
  SumOfSquaresArgs squares{};
  squares.operands = &operand;
  squares.first_chunk = first_chunk;
  squares.count = squares.groups = 1;
  squares.flag = is_up;
  squares.partial = data<double>(partial);
  const TapGradientArgs args{squares.partial, chunks, is_up, slot_of(slots, gradient, slot, 2, kTapGradientSums)};
  INFLECTION_RUN(sum_of_squares, squares, gradient, chunks, 4);
  INFLECTION_RUN(tap_gradient, args, gradient, 1, 1);
}

}  // namespace

// clang-format off
INFLECTION_SCHEMAS(m) {
  m.def("tap_gradient(Tensor gradient, Tensor flag, Tensor(a!) slots, int slot) -> ()");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("tap_gradient", TORCH_BOX(&tap_gradient));
}

}  // namespace inflection
