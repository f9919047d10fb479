// activation_moments: what a block gives out, and how far it moved what it took in, from one read of both.
#include <algorithm>
#include <optional>
#include <tuple>

#include "dispatch.h"

namespace inflection {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// Strides over the batch dimensions of `like`; those of a mask that broadcasts are 0.
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

std::tuple<Tensor, Tensor> activation_moments(Tensor output, std::optional<Tensor> input, std::optional<Tensor> mask) {
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
  const int64_t scratch_sizes[] = {parts * kMomentSums}, sums_sizes[] = {kMomentSums};
  Tensor partial = torch::stable::new_empty(output, {scratch_sizes, 1}, ScalarType::Double);
  Tensor partial_largest = new_float(output, {parts});
  Tensor sums = torch::stable::new_empty(output, {sums_sizes, 1}, ScalarType::Double);
  Tensor largest = new_float(output, {});
  args.partial = static_cast<double*>(partial.mutable_data_ptr());
  args.partial_largest = static_cast<float*>(partial_largest.mutable_data_ptr());
  args.sums = static_cast<double*>(sums.mutable_data_ptr());
  args.largest = static_cast<float*>(largest.mutable_data_ptr());
  [[maybe_unused]] const int64_t elements = std::max<int64_t>(1, args.dim * args.part_rows);
  INFLECTION_RUN(activation_moments, args, output, parts, std::max<int64_t>(1, kGrain / elements));
  INFLECTION_RUN(activation_moments_merge, args, output, kMomentSums + 1, kMomentSums + 1);
  return {sums, largest};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("activation_moments", TORCH_BOX(&activation_moments));
}

}  // namespace inflection
