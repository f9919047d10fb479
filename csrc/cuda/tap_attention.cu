// Which rows a tap of attention samples, and the sums over their statistics.
//
// One block per head, its threads take positions in turn; sums are joined in a fixed order, so the result is the same in
// every run. A few thousand numbers from the cache: bound by the launch. The flag is read here, on the device, because a
// captured graph is replayed whole: at 0, all rows lie outside, for which the kernel of the statistics reads nothing.
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
  sums.rows = block_sum<kThreads>(sums.rows, memory.sums);
  sums.entropy = block_sum<kThreads>(sums.entropy, memory.sums);
  sums.collision = block_sum<kThreads>(sums.collision, memory.sums);
  sums.sink = block_sum<kThreads>(sums.sink, memory.sums);
  sums.yy = block_sum<kThreads>(sums.yy, memory.sums);
  sums.yv = block_sum<kThreads>(sums.yv, memory.sums);
  sums.vv = block_sum<kThreads>(sums.vv, memory.sums);
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)
    sums.max_logit = larger_or_nan(sums.max_logit, __shfl_xor_sync(kAllLanes, sums.max_logit, lanes));
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
