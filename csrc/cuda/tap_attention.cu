// The rows that a tap of attention samples, and the sums over their statistics.
//
// One block per head, whose threads take positions in turn; sums are added in a fixed order, so the result is
// deterministic. A few thousand numbers from the cache: bound by the launch. The kernels read the flag, because a captured
// graph replays all of them: if it is 0, all positions are out of range, and the kernel of the statistics reads nothing.
#include "core/tap_sums.h"
#include "warp.cuh"

namespace inflection {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) choose_rows(TapRowsArgs args) {
  const int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (r >= args.num_rows) return;
  const bool up = *args.flag != 0;
  args.rows[r] = !up ? -1 : args.draws ? sampled_position(r, args.num_rows, args.queries, args.draws[r]) : r;
}

__global__ void __launch_bounds__(kThreads) sum_heads(TapAttentionArgs args) {
  if (*args.flag == 0) return;
  struct Shared {
    double sums[kThreads / kWarpSize];
    float largest[kThreads / kWarpSize];
  };
  Shared& memory = shared<Shared>();
  TapSums sums = tap_sums(args, blockIdx.x, threadIdx.x, kThreads);
#pragma unroll
  for (int i = 0; i < kTapTotals; ++i) sums.totals[i] = block_sum<kThreads>(sums.totals[i], memory.sums);
  sums.max_logit = warp_reduce(sums.max_logit, [](float a, float b) { return larger_or_nan(a, b); });
  if (threadIdx.x % kWarpSize == 0) memory.largest[threadIdx.x / kWarpSize] = sums.max_logit;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp)
    sums.max_logit = larger_or_nan(sums.max_logit, memory.largest[warp]);
  write_tap_sums(args, blockIdx.x, sums);
}

}  // namespace

int tap_rows_cuda(const TapRowsArgs& args, void* stream) {
  if (args.num_rows == 0) return cudaSuccess;
  return launch(choose_rows, dim3((args.num_rows + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, args);
}

int tap_attention_cuda(const TapAttentionArgs& args, void* stream) {
  if (args.heads == 0) return cudaSuccess;
  constexpr size_t kShared = (sizeof(double) + sizeof(float)) * kThreads / kWarpSize;
  return launch(sum_heads, dim3(args.heads), dim3(kThreads), kShared, stream, args);
}

}  // namespace inflection
