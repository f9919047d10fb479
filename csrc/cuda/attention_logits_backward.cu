// The gradient of statistics of softmax rows from logits: one read of the logits, one write of the gradient, a warp per
// row or slice of a row; bound by memory.
//
// Where the log-sum-exp of a row is large its statistics are taken again: a float of 1e3 puts 6e-5 into every probability.
#include "logit_rows.cuh"

namespace inflection {
namespace {

template <bool kMask>
constexpr int kResidentBackward = kMask ? 1 : 2;

__device__ __forceinline__ float at(const float* values, int64_t i) { return values == nullptr ? 0.f : values[i]; }

// One warp a row, or a slice of it. G is the dtype of the gradient: that of the logits, or float32 for the gradient of
// the scores.
template <class T, class G, bool kVector, bool kMask>
__global__ void __launch_bounds__(kThreads, kResidentBackward<kMask>)
    backward_by_warp(AttentionStatsBackwardArgs args, Form form, Exponential unscaled, int64_t items, Cuts slices,
                     int64_t parts) {
  using Part = Slice<T, kVector, kMask, kOtherSlice>;
  constexpr float kNothing = -80.f;  // e^-80 is 0 here
  const int64_t piece = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize, item = piece / slices.count;
  if (item >= items) return;
  const int thread = threadIdx.x % kWarpSize;
  const Row row = row_of(args.forward, item);
  const float lse = args.rows.lse[row.index], scale = static_cast<float>(form.scale);
  float top = 0.f, log_sum = lse;  // log p = (value - top) * scale - log_sum
  if (is_large(lse)) {
    int keys = 0;
    const RowTotal total =
        args.forward.parts != nullptr
            ? merge_parts(args.forward.parts + item * parts, parts, form.exponential, keys)
            : total_of<T, kVector, kMask, kOtherSlice>(args.forward, form, row, 0, thread, kWarpSize, keys);
    top = total.max;
    log_sum = static_cast<float>(log1p(total.below + (total.tops - 1)));
  }
  const float g = at(args.rows.grad_entropy, row.index) * args.out_scale;
  const float c = 2.f * at(args.rows.grad_collision, row.index) * args.out_scale;
  float sink = at(args.rows.grad_sink, row.index) * args.out_scale;
  if (sink != 0.f) sink *= args.rows.sink[row.index];
  float constant = at(args.rows.grad_lse, row.index) * args.out_scale - g * args.rows.entropy[row.index] - sink;
  if (c != 0.f) constant -= c * args.rows.collision[row.index];

  G* out = static_cast<G*>(args.grad) + row.index * args.forward.cols;
  const int64_t first = (piece - item * slices.count) * slices.cols, last = first + slices.cols;
  for (int64_t begin = first; begin < last && begin < args.forward.cols; begin += int64_t{Part::N} * kWarpSize) {
    Part part;
    if constexpr (kInPairs<T, kVector, kMask>) {
      PairSlice<T, kOtherSlice> pairs;
      pairs.read(args.forward, row, begin, thread, kWarpSize);
      part.take(pairs, args.forward, form);
    } else {
      part.read(args.forward, form, row, begin, thread, kWarpSize);
    }
#pragma unroll
    for (int i = 0; i < Part::N; ++i) {
      float u = part.value[i] - top;
      if (kMask && form.low) u += part.low[i];
      u = at_least(fmaf(u, scale, -log_sum), kNothing);
      const float p = u == kNothing ? 0.f : unscaled(u);
      const int64_t col = Part::column(begin, i, thread, kWarpSize);
      float slope = p * (fmaf(p, c, constant) - g * u);
      if (col == 0) slope += sink;
      if (part.value[i] == -kInf) slope = 0.f;  // also in a row without keys, or one that is NaN
      if (col < args.forward.cols) put(out + col, slope);
    }
  }
}

template <class T, class G, bool kVector, bool kMask>
int run_backward(const AttentionStatsBackwardArgs& args, void* stream) {
  const Form form = form_of(args.forward);
  const Exponential unscaled = Exponential::of(1.0);
  const int64_t items = args.forward.batch * args.forward.rows, cols = args.forward.cols;
  if (items == 0 || cols == 0) return cudaSuccess;
  const Cuts slices = Cuts::of(row_slices(items, cols), cols);
  if (slices.count > 1) {
    const int error = stats_of_large_rows_cuda(args.forward, args.rows.lse, stream);
    if (error != cudaSuccess) return error;
  }
  return launch(backward_by_warp<T, G, kVector, kMask>, grid_of_warps(items * slices.count), dim3(kThreads), 0, stream,
                args, form, unscaled, items, slices, row_parts(items, cols));
}

template <class T, class G>
int run_backward(const AttentionStatsBackwardArgs& args, void* stream) {
  if (vectors_fit(args.forward, sizeof(T)))
    return args.forward.mask.data ? run_backward<T, G, true, true>(args, stream)
                                  : run_backward<T, G, true, false>(args, stream);
  return args.forward.mask.data ? run_backward<T, G, false, true>(args, stream)
                                : run_backward<T, G, false, false>(args, stream);
}

}  // namespace

int attention_stats_backward_cuda(const AttentionStatsBackwardArgs& args, void* stream) {
  const bool of_scores = args.grad_dtype == DType::f32;
  switch (args.forward.dtype) {
    case DType::f32: return run_backward<float, float>(args, stream);
    case DType::bf16:
      return of_scores ? run_backward<BF16, float>(args, stream) : run_backward<BF16, BF16>(args, stream);
    default: return of_scores ? run_backward<F16, float>(args, stream) : run_backward<F16, F16>(args, stream);
  }
}

}  // namespace inflection
