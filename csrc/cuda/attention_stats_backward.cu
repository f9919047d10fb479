// The gradient of statistics of softmax rows from logits. One read of the logits, one write of the gradient; a warp per
// row or slice of a row. Bound by memory: at 4096 columns of 16 bits 18 instructions per element of the 39 possible.
//
// If the log-sum-exp of a row is large, its statistics are computed again: rounding an lse of 1e3 to float32 changes each
// probability by 6e-5. Rows without non-finite values, whose masked columns are far below the maximum, need no check of
// single 16-bit logits.
#include <type_traits>

#include "core/row_gradient.h"
#include "logit_rows.cuh"

namespace inflection {
namespace {

template <bool kMask>
constexpr int kResidentBackward = kMask ? 1 : 2;

constexpr float kNothing = -100.f;  // e^x counts as 0 from here on: it is below the smallest normal number

// The gradient of a row as a function of its values.
struct RowSlope {
  float top, scale, log_sum;  // log p = x * scale - log_sum, x = value - top
  RowGradient gradient;

  __device__ __forceinline__ float log_p(float x) const { return fmaf(x, scale, -log_sum); }
  __device__ __forceinline__ float at(float log_p) const {
    return gradient.at(exp2_approx(log_p * static_cast<float>(kLog2e)), log_p);
  }
  // Whether everything is finite, and columns at `floor` and below get 0 without a check.
  __device__ __forceinline__ bool is_plain(float floor) const {
    const float all = log_sum + gradient.constant;
    return all - all == 0.f && log_p(floor - top) < kNothing;
  }
};

// Stores adjacent numbers, 16-byte aligned. With __stcg, because nvcc splits an assignment of a uint4 here.
template <class G, int N>
__device__ __forceinline__ void store_run(G* out, const float (&x)[N]) {
  uint4* const to = reinterpret_cast<uint4*>(out);
  if constexpr (sizeof(G) == sizeof(float)) {
    const auto bits = [&x](int i) { return __float_as_uint(x[i]); };
#pragma unroll
    for (int i = 0; i < N; i += 4) __stcg(to + i / 4, make_uint4(bits(i), bits(i + 1), bits(i + 2), bits(i + 3)));
  } else {
    static_assert(N == 8);
    __stcg(to, make_uint4(pack<G>(x[0], x[1]), pack<G>(x[2], x[3]), pack<G>(x[4], x[5]), pack<G>(x[6], x[7])));
  }
}

// One warp per row, or per slice of a row. G is the dtype of the gradient: that of the logits, or float32 for the gradient
// of the scores. `whole_runs`: each 16 bytes of the gradient belong to one row.
template <class T, class G, bool kVector, bool kMask>
__global__ void __launch_bounds__(kThreads, kResidentBackward<kMask>)
    backward_by_warp(AttentionStatsBackwardArgs args, Form form, bool whole_runs, int64_t items, Cuts slices,
                     int64_t parts) {
  using Part = Slice<T, kVector, kMask, kOtherSlice>;
  constexpr bool kPlain = kInPairs<T, kVector, kMask> && std::is_same_v<T, G>;
  const int64_t piece = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize, item = piece / slices.count;
  if (item >= items) return;
  const int thread = threadIdx.x % kWarpSize;
  const Row row = row_of(args.forward, item);
  RowSlope slope;
  slope.top = 0.f, slope.log_sum = args.rows.lse[row.index], slope.scale = static_cast<float>(form.scale);
  if (is_large(slope.log_sum)) {
    int keys = 0;
    const MergedRow total =
        args.forward.parts != nullptr
            ? merge_parts(args.forward.parts + item * parts, parts, form.exponential, keys)
            : total_of<T, kVector, kMask, kOtherSlice>(args.forward, form, row, 0, thread, kWarpSize, keys);
    slope.top = total.max;
    slope.log_sum = static_cast<float>(log1p(total.below + (total.tops - 1)));
  }
  slope.gradient = RowGradient::of(args.rows, row.index, args.out_scale, true);

  const bool plain = kPlain && form.factor == 1.f && slope.is_plain(args.forward.floor);
  G* out = static_cast<G*>(args.grad) + row.index * args.forward.cols;
  const int64_t first = (piece - item * slices.count) * slices.cols, last = first + slices.cols;
  for (int64_t begin = first; begin < last && begin < args.forward.cols; begin += int64_t{Part::N} * kWarpSize) {
    const int64_t col = Part::column(begin, 0, thread, kWarpSize);
    float slopes[Part::N];
    Part part;
    if constexpr (kInPairs<T, kVector, kMask>) {
      PairSlice<T, kOtherSlice> pairs;
      pairs.read(args.forward, row, begin, thread, kWarpSize);
      if (plain) {
#pragma unroll
        for (int i = 0; i < Part::N / 2; ++i) {
          slopes[2 * i] = slope.at(fmaxf(slope.log_p(front<T>(pairs.pair[i]) - slope.top), kNothing));
          slopes[2 * i + 1] = slope.at(fmaxf(slope.log_p(back<T>(pairs.pair[i]) - slope.top), kNothing));
        }
      } else {
        part.take(pairs, args.forward, form);
      }
    } else {
      part.read(args.forward, form, row, begin, thread, kWarpSize);
    }
    if (!plain) {
#pragma unroll
      for (int i = 0; i < Part::N; ++i) {
        float x = part.value[i] - slope.top;
        if (kMask && form.low) x += part.low[i];
        const float found = slope.at(at_least(slope.log_p(x), kNothing));
        slopes[i] = part.value[i] == -kInf ? 0.f : found;  // also in a row without keys or with NaN
      }
    }
    if (col == 0 && (plain || part.value[0] != -kInf)) slopes[0] += slope.gradient.first;
    if constexpr (kVector) {
      if (whole_runs) {
        if (col < args.forward.cols) store_run(out + col, slopes);
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < Part::N; ++i) {
      const int64_t at = Part::column(begin, i, thread, kWarpSize);
      if (at < args.forward.cols) put(out + at, slopes[i]);
    }
  }
}

template <class T, class G, bool kVector, bool kMask>
int run_backward(const AttentionStatsBackwardArgs& args, void* stream) {
  const Form form = form_of(args.forward);
  const int64_t items = args.forward.batch * args.forward.rows, cols = args.forward.cols;
  if (items == 0 || cols == 0) return cudaSuccess;
  const Cuts slices = Cuts::of(row_slices(items, cols), cols);
  if (slices.count > 1) {
    const int error = stats_of_large_rows_cuda(args.forward, args.rows.lse, stream);
    if (error != cudaSuccess) return error;
  }
  const bool whole_runs = reinterpret_cast<uintptr_t>(args.grad) % kVectorBytes == 0 &&
                          cols * static_cast<int64_t>(sizeof(G)) % kVectorBytes == 0;
  return launch(backward_by_warp<T, G, kVector, kMask>, grid_of_warps(items * slices.count), dim3(kThreads), 0, stream,
                args, form, whole_runs, items, slices, row_parts(items, cols));
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
  return for_dtype(args.forward.dtype, [&](auto zero) {
    using T = decltype(zero);
    return args.grad_dtype == DType::f32 ? run_backward<T, float>(args, stream) : run_backward<T, T>(args, stream);
  });
}

}  // namespace inflection
