// Moments of a block's output, and its distance from the block's input.
//
// A warp takes a part of the rows, row by row, 16 bytes per lane if the layout allows it; sums are float64. A second
// launch adds the parts in a fixed order, so the result is deterministic. Bound by memory: each element is read once from
// it. A row with a massive activation is read again from the cache, to find its median bit by bit.
#include "core/moments.h"
#include "warp.cuh"

namespace inflection {
namespace {

constexpr int kWarps = 8;   // of a block; they are independent
constexpr int kBlocks = 2;  // least number per multiprocessor: the compiler may use 128 registers
constexpr int kMergeThreads = 256;
constexpr int kVectorBytes = 16;

template <class T>
struct MomentRow {
  const T* data;
  int64_t stride, dim;
};

// Calls use(y, x) for each element of this lane. Reads vectors if both rows are contiguous and aligned.
template <class Y, class X, class Use>
__device__ __forceinline__ void each(const MomentRow<Y>& y, const MomentRow<X>& x, Use use) {
  const int lane = threadIdx.x % kWarpSize;
  constexpr int kPerVector = kVectorBytes / (sizeof(Y) > sizeof(X) ? sizeof(Y) : sizeof(X));
  const bool whole = y.stride == 1 && reinterpret_cast<uintptr_t>(y.data) % kVectorBytes == 0 &&
                     (!x.data || (x.stride == 1 && reinterpret_cast<uintptr_t>(x.data) % kVectorBytes == 0));
  const int64_t vectors = whole ? y.dim / kPerVector : 0;
  for (int64_t i = lane; i < vectors; i += kWarpSize) {
    struct alignas(kPerVector * sizeof(Y)) Ys {
      Y values[kPerVector];
    };
    struct alignas(kPerVector * sizeof(X)) Xs {
      X values[kPerVector];
    };
    const Ys ys = *reinterpret_cast<const Ys*>(y.data + i * kPerVector);
    Xs xs{};
    if (x.data) xs = *reinterpret_cast<const Xs*>(x.data + i * kPerVector);
#pragma unroll
    for (int j = 0; j < kPerVector; ++j) use(to_float(ys.values[j]), to_float(xs.values[j]));
  }
  for (int64_t i = vectors * kPerVector + lane; i < y.dim; i += kWarpSize) {
    use(to_float(y.data[i * y.stride]), x.data ? to_float(x.data[i * x.stride]) : 0.f);
  }
}

template <class T>
__device__ int64_t at_most(const MomentRow<T>& row, float limit) {  // number of magnitudes; the same in all lanes
  int64_t count = 0;
  each(row, MomentRow<T>{nullptr, 1, 0}, [&](float y, float) { count += fabsf(y) <= limit; });
  return warp_sum(count);
}

template <class T>
__device__ double massive_of_row(const MomentRow<T>& row, float largest) {
  const double limit = massive_limit(row.dim, largest, [&](float x) { return at_most(row, x); });
  double count = 0.0;
  if (limit != limit) return count;
  each(row, MomentRow<T>{nullptr, 1, 0}, [&](float y, float) {
    const double x = fabsf(y);
    count += x > kMassiveMagnitude && x >= limit;
  });
  return warp_sum(count);
}

template <class Y, class X>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocks) moments_of_parts(ActivationMomentsArgs args) {
  const int64_t parts = args.parts, rows = args.part_rows;
  const int64_t part = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (part >= parts) return;
  const int64_t end = (part + 1) * rows < args.rows ? (part + 1) * rows : args.rows;
  const int lane = threadIdx.x % kWarpSize;
  double sum = 0.0;  // lane k keeps sum k: twelve sums in each lane would not fit into the registers
  const auto add = [&](int k, double x) { sum += lane == k ? x : 0.0; };
  float largest = 0.f;
  for (int64_t row = part * rows; row < end; ++row) {
    int64_t of_y = 0, of_x = 0, of_mask = 0;
    for_indices(row, args.sizes, args.dims, [&](int32_t d, int64_t i) {
      of_y += i * args.y.strides[d];
      of_x += i * args.x.strides[d];
      of_mask += i * args.mask.strides[d];
    });
    if (args.mask.data && !static_cast<const bool*>(args.mask.data)[of_mask]) continue;
    const MomentRow<Y> y{static_cast<const Y*>(args.y.data) + of_y, args.y.col_stride, args.dim};
    const bool both = args.x.data != nullptr;
    const MomentRow<X> x{both ? static_cast<const X*>(args.x.data) + of_x : nullptr, args.x.col_stride, args.dim};
    RowMoments sums{};
    float top = 0.f;
    each(y, x, [&](float ys, float xs) {
      const double b = ys, a = xs, square = b * b, moved = b - a;
      top = larger_or_nan(fabsf(ys), top);
      sums.first += b;
      sums.second += square;
      sums.third += square * b;
      sums.fourth += square * square;
      sums.input += a * a;
      sums.product += a * b;
      sums.change += moved * moved;
    });
    sums.first = warp_sum(sums.first), sums.second = warp_sum(sums.second);
    sums.third = warp_sum(sums.third), sums.fourth = warp_sum(sums.fourth);
    if (both)
      sums.input = warp_sum(sums.input), sums.product = warp_sum(sums.product), sums.change = warp_sum(sums.change);
    top = warp_reduce(top, [](float a, float b) { return larger_or_nan(a, b); });
    if (sums.second != sums.second) top = NAN;
    const double massive = top > kMassiveMagnitude ? massive_of_row(y, top) : top != top ? double(top) : 0.0;
    add_row(sums, args.dim, massive, both, add);
    largest = larger_or_nan(top, largest);
  }
  if (lane < kMomentSums) args.partial[lane * parts + part] = sum;
  if (lane == 0) args.partial_largest[part] = largest;
}

// One block per sum, the last one for the maximum.
__global__ void __launch_bounds__(kMergeThreads) merge_parts(ActivationMomentsArgs args) {
  const int64_t parts = args.parts;
  double* scratch = &shared<double>();
  if (blockIdx.x < kMomentSums) {
    double total = 0.0;
    for (int64_t part = threadIdx.x; part < parts; part += kMergeThreads)
      total += args.partial[blockIdx.x * parts + part];
    total = block_sum<kMergeThreads>(total, scratch);
    if (threadIdx.x == 0) args.sums[blockIdx.x] = total;
    return;
  }
  float top = 0.f;
  for (int64_t part = threadIdx.x; part < parts; part += kMergeThreads)
    top = larger_or_nan(args.partial_largest[part], top);
  top = warp_reduce(top, [](float a, float b) { return larger_or_nan(a, b); });
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = top;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 0; warp < kMergeThreads / kWarpSize; ++warp)
    top = larger_or_nan(static_cast<float>(scratch[warp]), top);
  *args.largest = top;
}

template <class Y, class X>
int run(const ActivationMomentsArgs& args, void* stream) {
  const int64_t parts = args.parts;
  if (parts == 0) return cudaSuccess;
  return launch(moments_of_parts<Y, X>, dim3(static_cast<unsigned>(ceil_div(parts, kWarps))), dim3(kWarps * kWarpSize),
                0, stream, args);
}

}  // namespace

int activation_moments_cuda(const ActivationMomentsArgs& args, void* stream) {
  return for_dtype(args.y.dtype, [&](auto y) {
    return for_dtype(args.x.dtype, [&](auto x) { return run<decltype(y), decltype(x)>(args, stream); });
  });
}

int activation_moments_merge_cuda(const ActivationMomentsArgs& args, void* stream) {
  return launch(merge_parts, dim3(kMomentSums + 1), dim3(kMergeThreads), sizeof(double) * kMergeThreads / kWarpSize,
                stream, args);
}

}  // namespace inflection
