// Adds up the chunks of a gradient's sum of squares into a slot: one warp, in the order of sum_of_squares_merge.
#include "taps.h"
#include "warp.cuh"

namespace inflection {
namespace {

__global__ void __launch_bounds__(kWarpSize) add_chunks(TapGradientArgs args) {
  if (*args.flag == 0) return;
  double total = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < args.chunks; chunk += kWarpSize) total += args.partial[chunk];
  total = warp_sum(total);
  if (threadIdx.x != 0) return;
  args.sums[0] += 1;
  args.sums[1] += total;
}

}  // namespace

int tap_gradient_cuda(const TapGradientArgs& args, void* stream) {
  return launch(add_chunks, dim3(1), dim3(kWarpSize), 0, stream, args);
}

}  // namespace inflection
