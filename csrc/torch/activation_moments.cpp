// activation_moments: moments of a block's output, and its distance from the block's input.
#include <algorithm>
#include <tuple>

#include "dispatch.h"

namespace inflection {
namespace {

constexpr int64_t kGrain = 1 << 15;  // least number of elements per thread

// A tensor with its strides over the batch dimensions of `like`; 0 in dimensions in which a mask is broadcast.
MomentRows rows_of(const Tensor& tensor, const Tensor& like, const char* name, bool columns) {
  check_device(tensor, name);
  STD_TORCH_CHECK(tensor.get_device() == like.get_device(), name, ": must be on the device of output");
  const int64_t dims = like.dim() - 1, own = tensor.dim() - (columns ? 1 : 0);
  STD_TORCH_CHECK(own <= dims && (!columns || own == dims), name, ": does not fit the shape of output");
  MomentRows rows{tensor.const_data_ptr(), {}, 1, dtype_of(tensor, name)};
  STD_TORCH_CHECK((rows.dtype == DType::boolean) != columns, name, ": need bool for a mask, a float otherwise");
  for (int64_t d = 0; d < own; ++d) {
    const int64_t at = dims - own + d;
    STD_TORCH_CHECK(tensor.size(d) == like.size(at) || (!columns && tensor.size(d) == 1), name,
                    ": does not fit the shape of output");
    rows.strides[at] = tensor.size(d) == 1 ? 0 : tensor.stride(d);
  }
  if (columns) {
    STD_TORCH_CHECK(tensor.size(dims) == like.size(dims), name, ": does not fit the shape of output");
    rows.col_stride = tensor.stride(dims);
  }
  return rows;
}

std::tuple<Tensor, Tensor> activation_moments(Tensor output, MaybeTensor input, MaybeTensor mask) {
  const int64_t dims = output.dim() - 1;
  STD_TORCH_CHECK(dims >= 0 && dims <= kMaxDims, "output: need 1 to ", kMaxDims + 1, " dimensions");
  ActivationMomentsArgs args{};
  args.y = rows_of(output, output, "output", true);
  if (input.has_value()) args.x = rows_of(*input, output, "input", true);
  if (mask.has_value()) args.mask = rows_of(*mask, output, "mask", false);
  args.dims = static_cast<int32_t>(dims);
  args.rows = 1;
  for (int64_t d = 0; d < dims; ++d) args.rows *= args.sizes[d] = output.size(d);
  args.dim = output.size(dims);
  args.part_rows = moment_part_rows(args.rows);
  const int64_t parts = args.parts = moment_parts(args.rows);
  Tensor partial = new_double(output, {parts * kMomentSums}), partial_largest = new_float(output, {parts});
  Tensor sums = new_double(output, {kMomentSums}), largest = new_float(output, {});
  args.partial = data<double>(partial);
  args.partial_largest = data<float>(partial_largest);
  args.sums = data<double>(sums);
  args.largest = data<float>(largest);
  [[maybe_unused]] const int64_t elements = std::max<int64_t>(1, args.dim * args.part_rows);
  INFLECTION_RUN(activation_moments, args, output, parts, std::max<int64_t>(1, kGrain / elements));
  INFLECTION_RUN(activation_moments_merge, args, output, kMomentSums + 1, kMomentSums + 1);
  return {sums, largest};
}

}  // namespace

// clang-format off
INFLECTION_SCHEMAS(m) {
  m.def("activation_moments(Tensor output, Tensor? input, Tensor? mask) -> (Tensor sums, Tensor largest)");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("activation_moments", TORCH_BOX(&activation_moments));
}

}  // namespace inflection
