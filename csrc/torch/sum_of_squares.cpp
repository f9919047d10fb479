// sum_of_squares: sums over many tensors of any size and layout, one float64 per group.
#include <vector>

#include "operand.h"

namespace inflection {
namespace {

Tensor sum_of_squares(std::vector<Tensor> tensors, std::vector<int64_t> groups, int64_t num_groups,
                      MaybeTensor inv_scale) {
  STD_TORCH_CHECK(tensors.size() == groups.size() && !tensors.empty(),
                  "tensors and groups: need equally many, at least one");
  std::vector<Operand> operands;
  std::vector<int64_t> first_chunk{0};
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_device(tensors[i], "tensors");
    STD_TORCH_CHECK(tensors[i].get_device() == tensors[0].get_device(), "tensors: all must be on one device");
    STD_TORCH_CHECK(groups[i] >= 0 && groups[i] < num_groups, "groups: ", groups[i], " is outside [0, ", num_groups,
                    ")");
    operands.push_back(operand_of(tensors[i], "tensors", static_cast<int32_t>(groups[i])));
    first_chunk.push_back(first_chunk.back() + ceil_div(operands.back().numel, kSquaresChunk));
  }
  STD_TORCH_CHECK(!inv_scale || inv_scale->get_device() == tensors[0].get_device(),
                  "inv_scale: must be on the device of the tensors");
  const int64_t chunks = first_chunk.back();
  Tensor partial = new_double(tensors[0], {chunks + num_groups}), out = new_double(tensors[0], {num_groups});
  const SumOfSquaresArgs args{operands.data(),
                              first_chunk.data(),
                              static_cast<int64_t>(operands.size()),
                              num_groups,
                              inv_scale ? elements<const float>(*inv_scale, "inv_scale", 1) : nullptr,
                              nullptr,
                              data<double>(partial),
                              data<double>(partial) + chunks,
                              data<double>(out)};
  INFLECTION_RUN(sum_of_squares, args, tensors[0], chunks, 4);
  INFLECTION_RUN(sum_of_squares_merge, args, tensors[0], num_groups, 64);
  return out;
}

}  // namespace

// clang-format off
INFLECTION_SCHEMAS(m) {
  m.def("sum_of_squares(Tensor[] tensors, int[] groups, int num_groups, Tensor? inv_scale=None) -> Tensor");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares));
}

}  // namespace inflection
