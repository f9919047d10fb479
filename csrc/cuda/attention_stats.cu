// Statistics of softmax rows from logits.
//
// A row is processed by one warp; by a block if rows are few and long; or, if blocks would not fill the device, by several
// blocks, whose states a second kernel merges in a fixed order. Each thread has its own state and holds slices of 16 bytes
// in registers: the maximum of the slice first, then the exponentials, so the sums are rebased once per slice. States are
// merged once per row. Under a causal mask rows are read up to the diagonal only, the longest first. Each logit is read
// once, and dense rows are bound by memory (docs/kernels.md): at 4096 columns a 16-bit logit takes 17 instructions of the
// 20 that an H100 can issue while it arrives, a float32 one 32 of 39.
//
// Special rows and masked columns are as in csrc/cpu/attention_stats.inc.
#include "logit_rows.cuh"

namespace inflection {
namespace {

template <bool kVector, bool kMask>
constexpr int kSlice = kVector && !kMask ? kDenseSlice : kOtherSlice;
// Without a bound (0) nvcc spills for sm_100 with a mask; in other cases it does better without.
template <bool kMask>
constexpr int kResident = kMask ? kResidentBlocks : 0;
constexpr int64_t kLongRow = 1024;  // least number of columns for one block per row, if rows are fewer than kFillWarps

// The unscaled score of key 0; -inf if it is masked.
template <class T>
__device__ double first_score(const AttentionStatsArgs& args, const Form& form, const Row& row) {
  if (row.cols == 0) return -kInf;
  const float v = to_float(static_cast<const T*>(args.logits)[row.logits]);
  if (v <= args.floor) return -kInf;
  float bias = 0.f;
  if (args.mask.data != nullptr && !attends(args.mask, row.mask, bias)) return -kInf;
  const float product = __fmul_rn(v, form.factor);
  if (!form.low) return product;
  float score, low;
  add_bias(v, product, fmaf(v, form.factor, -product), form.factor_low, bias, score, low);
  return double(score) + low;
}

template <class T, bool kVector, bool kMask>
__global__ void __launch_bounds__(kThreads, kResident<kMask>)
    stats_by_warp(AttentionStatsArgs args, Form form, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (item >= items) return;
  const int thread = threadIdx.x % kWarpSize;
  const Row row = row_of(args, item);
  int keys = 0;
  const MergedRow total =
      total_of<T, kVector, kMask, kSlice<kVector, kMask>>(args, form, row, 0, thread, kWarpSize, keys);
  keys = warp_sum(keys);
  if (thread != 0) return;
  const double first = form.first ? first_score<T>(args, form, row) : -kInf;
  write_row(total, keys, first, form.scale, form.exponential, row.index, args.out);
}

struct BlockMemory {
  MergedRow totals[kWarps];
  int keys[kWarps];
};

// One block per row, or per part of a row, whose state is written to args.parts. With `lse`: only rows with a large one.
template <class T, bool kVector, bool kMask>
__global__ void __launch_bounds__(kThreads, kResident<kMask>)
    stats_by_block(AttentionStatsArgs args, Form form, Cuts cuts, const float* lse) {
  static_assert(kWarps <= kWarpSize);
  BlockMemory& memory = shared<BlockMemory>();
  Row row = row_of(args, blockIdx.x / cuts.count);
  if (lse != nullptr && !is_large(lse[row.index])) return;
  const int64_t begin = blockIdx.x % cuts.count * cuts.cols;
  if (begin + cuts.cols < row.cols) row.cols = begin + cuts.cols;
  int keys = 0;
  MergedRow total =
      total_of<T, kVector, kMask, kSlice<kVector, kMask>>(args, form, row, begin, threadIdx.x, kThreads, keys);
  keys = warp_sum(keys);
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) memory.totals[warp] = total, memory.keys[warp] = keys;
  __syncthreads();
  if (warp != 0) return;
  total = threadIdx.x < kWarps ? memory.totals[threadIdx.x] : MergedRow{};
  total = merge_warp(total, form.exponential);
  keys = warp_sum(threadIdx.x < kWarps ? memory.keys[threadIdx.x] : 0);
  if (threadIdx.x != 0) return;
  if (args.parts != nullptr) {
    args.parts[blockIdx.x] = {total.below, total.dot, total.max, total.square, total.tops, keys};
    return;
  }
  const double first = form.first ? first_score<T>(args, form, row) : -kInf;
  write_row(total, keys, first, form.scale, form.exponential, row.index, args.out);
}

// One warp per row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    stats_of_parts(AttentionStatsArgs args, Form form, int64_t parts, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (item >= items) return;
  const Row row = row_of(args, item);
  int keys;
  const MergedRow total = merge_parts(args.parts + item * parts, parts, form.exponential, keys);
  if (threadIdx.x % kWarpSize != 0) return;
  const double first = form.first ? first_score<T>(args, form, row) : -kInf;
  write_row(total, keys, first, form.scale, form.exponential, row.index, args.out);
}

// With `large`: computes only the states of the parts of rows in which this log-sum-exp is large.
template <class T, bool kVector, bool kMask>
int run(const AttentionStatsArgs& args, const float* large, void* stream) {
  const Form form = form_of(args);
  const int64_t items = args.batch * args.rows;
  if (items == 0) return cudaSuccess;
  const int64_t parts = row_parts(items, args.cols);
  if (parts > 1 || large != nullptr) {
    if (args.parts == nullptr) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(items * parts));
    const int error = launch(stats_by_block<T, kVector, kMask>, grid, dim3(kThreads), sizeof(BlockMemory), stream, args,
                             form, Cuts::of(parts, args.cols), large);
    if (error != cudaSuccess || large != nullptr) return error;
    return launch(stats_of_parts<T>, grid_of_warps(items), dim3(kThreads), 0, stream, args, form, parts, items);
  }
  if (args.cols >= kLongRow && items < kFillWarps) {
    return launch(stats_by_block<T, kVector, kMask>, dim3(items), dim3(kThreads), sizeof(BlockMemory), stream, args,
                  form, Cuts::of(1, args.cols), nullptr);
  }
  return launch(stats_by_warp<T, kVector, kMask>, grid_of_warps(items), dim3(kThreads), 0, stream, args, form, items);
}

template <class T>
int run(const AttentionStatsArgs& args, const float* large, void* stream) {
  if (vectors_fit(args, sizeof(T)))
    return args.mask.data ? run<T, true, true>(args, large, stream) : run<T, true, false>(args, large, stream);
  return args.mask.data ? run<T, false, true>(args, large, stream) : run<T, false, false>(args, large, stream);
}

int run(const AttentionStatsArgs& args, const float* large, void* stream) {
  return for_dtype(args.dtype, [&](auto zero) { return run<decltype(zero)>(args, large, stream); });
}

}  // namespace

int attention_stats_cuda(const AttentionStatsArgs& args, void* stream) { return run(args, nullptr, stream); }

int stats_of_large_rows_cuda(const AttentionStatsArgs& args, const float* lse, void* stream) {
  return run(args, lse, stream);
}

}  // namespace inflection
