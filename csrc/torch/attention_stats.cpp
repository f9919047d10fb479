// attention_stats and its derivative: statistics of softmax rows from logits [..., rows, cols].
#include <algorithm>
#include <tuple>
#include <vector>

#include "attention.h"

namespace inflection {
namespace {

constexpr int64_t kColumnsPerTask = 1 << 15;  // about 10 us: long compared with the start of a task

AttentionStatsArgs arguments(const Tensor& logits, const MaybeTensor& attn_mask, bool is_causal, double scale) {
  check_device(logits, "logits");
  const int64_t dims = logits.dim();
  STD_TORCH_CHECK(dims >= 2, "logits: expected [..., queries, keys], got ", dims, " dimensions");
  AttentionStatsArgs args{};
  args.logits = logits.const_data_ptr();
  args.dtype = dtype_of(logits, "logits");
  STD_TORCH_CHECK(args.dtype != DType::boolean, "logits: dtype must be float32, bfloat16 or float16");
  args.floor = lowest(args.dtype) / 2;
  args.scale = scale;
  args.causal = is_causal;
  args.rows = logits.size(dims - 2), args.row_stride = logits.stride(dims - 2);
  args.cols = logits.size(dims - 1), args.col_stride = logits.stride(dims - 1);

  STD_TORCH_CHECK(args.cols <= kMostKeys, "logits: expected at most ", kMostKeys, " keys, got ", args.cols);

  args.mask = mask_of(attn_mask, logits);
  std::vector<int64_t> sizes, mask_strides(dims, 0);
  for (int64_t d = 0; d < dims; ++d) sizes.push_back(logits.size(d));
  if (attn_mask) broadcast_strides(*attn_mask, sizes.data(), dims, mask_strides.data());
  args.mask.row_stride = mask_strides[dims - 2], args.mask.col_stride = mask_strides[dims - 1];

  // Merges batch dimensions that are contiguous in the logits and in the mask.
  args.batch = 1;
  for (int64_t d = 0; d < dims - 2; ++d) {
    args.batch *= sizes[d];
    if (sizes[d] == 1) continue;
    const int32_t last = args.dims - 1;
    if (last >= 0 && args.strides[last] == logits.stride(d) * sizes[d] &&
        args.mask.strides[last] == mask_strides[d] * sizes[d]) {
      args.sizes[last] *= sizes[d], args.strides[last] = logits.stride(d), args.mask.strides[last] = mask_strides[d];
      continue;
    }
    STD_TORCH_CHECK(args.dims < kMaxDims, "logits: more than ", kMaxDims, " batch dimensions that cannot be merged");
    args.sizes[args.dims] = sizes[d], args.strides[args.dims] = logits.stride(d);
    args.mask.strides[args.dims++] = mask_strides[d];
  }
  return args;
}

[[maybe_unused]] int64_t grain(const AttentionStatsArgs& args) {
  return std::max<int64_t>(1, kColumnsPerTask / std::max<int64_t>(1, args.cols));
}

Tensor new_rows(const Tensor& logits, bool wanted) {
  std::vector<int64_t> sizes{0};
  if (wanted) {
    sizes.clear();
    for (int64_t d = 0; d < logits.dim() - 1; ++d) sizes.push_back(logits.size(d));
  }
  return new_tensor(logits, {sizes.data(), sizes.size()}, ScalarType::Float);
}

#ifdef INFLECTION_CPU_KERNELS
constexpr bool kCutsRows = false;
#else
constexpr bool kCutsRows = true;
#endif

// Scratch for rows that the GPU splits into `cuts` pieces; it must live until the kernels are enqueued.
MaybeTensor new_parts(const Tensor& logits, AttentionStatsArgs& args, int64_t cuts) {
  if (!kCutsRows || cuts <= 1) return std::nullopt;
  const int64_t items = args.batch * args.rows, parts = row_parts(items, args.cols);
  static_assert(sizeof(RowPart) % sizeof(double) == 0);
  Tensor scratch = new_double(logits, {items * parts, static_cast<int64_t>(sizeof(RowPart) / sizeof(double))});
  args.parts = data<RowPart>(scratch);
  return scratch;
}

using RowTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

RowTensors attention_stats(Tensor logits, MaybeTensor attn_mask, bool is_causal, double scale, bool entropy_only) {
  AttentionStatsArgs args = arguments(logits, attn_mask, is_causal, scale);
  const auto fresh = [&](bool wanted, float*& pointer) {
    Tensor tensor = new_rows(logits, wanted);
    pointer = wanted ? data<float>(tensor) : nullptr;
    return tensor;
  };
  Tensor entropy = fresh(true, args.out.entropy), lse = fresh(true, args.out.lse);
  Tensor max_logit = fresh(!entropy_only, args.out.max_logit), keys = fresh(!entropy_only, args.out.keys);
  Tensor collision = fresh(!entropy_only, args.out.collision), sink = fresh(!entropy_only, args.out.sink);
  const auto parts = new_parts(logits, args, row_parts(args.batch * args.rows, args.cols));
  INFLECTION_RUN(attention_stats, args, logits, args.batch * args.rows, grain(args));
  return {entropy, lse, max_logit, keys, collision, sink};
}

// `of_scores`: the gradient of logits * scale + mask in float32 instead of that of the logits in their dtype.
Tensor attention_stats_backward(MaybeTensor grad_entropy, MaybeTensor grad_lse, MaybeTensor grad_collision,
                                MaybeTensor grad_sink, Tensor entropy, Tensor lse, Tensor collision, Tensor sink,
                                Tensor logits, MaybeTensor attn_mask, bool is_causal, double scale, bool of_scores) {
  AttentionStatsBackwardArgs args{};
  args.forward = arguments(logits, attn_mask, is_causal, scale);
  const int64_t count = args.forward.batch * args.forward.rows;
  args.rows = row_gradients(count, grad_entropy, grad_lse, grad_collision, grad_sink, entropy, lse, collision, sink,
                            std::nullopt);
  args.out_scale = of_scores ? 1.f : static_cast<float>(scale);
  args.grad_dtype = of_scores ? DType::f32 : args.forward.dtype;

  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < logits.dim(); ++d) sizes.push_back(logits.size(d));
  const ScalarType dtype = of_scores ? ScalarType::Float : logits.scalar_type();
  Tensor grad = new_tensor(logits, {sizes.data(), sizes.size()}, dtype);
  args.grad = grad.data_ptr();
  const auto parts = new_parts(logits, args.forward, row_slices(count, args.forward.cols));
  INFLECTION_RUN(attention_stats_backward, args, logits, count, grain(args.forward));
  return grad;
}

}  // namespace

// clang-format off
INFLECTION_SCHEMAS(m) {
  m.def("attention_stats(Tensor logits, Tensor? attn_mask, bool is_causal, float scale, bool entropy_only) -> (Tensor entropy, Tensor lse, Tensor max_logit, Tensor keys, Tensor collision, Tensor sink)");
  m.def("attention_stats_backward(Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_collision, Tensor? grad_sink, Tensor entropy, Tensor lse, Tensor collision, Tensor sink, Tensor logits, Tensor? attn_mask, bool is_causal, float scale, bool of_scores) -> Tensor");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("attention_stats", TORCH_BOX(&attention_stats));
  m.impl("attention_stats_backward", TORCH_BOX(&attention_stats_backward));
}

}  // namespace inflection
