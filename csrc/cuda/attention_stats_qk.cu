// Statistics of softmax rows fused from Q and K.
//
// A block takes one tile of query rows of one key head, with all heads of its group packed together, and iterates over
// tiles of 64 keys, which are copied asynchronously one tile ahead. Each lane has its own state for each of its rows, so
// lanes exchange nothing in the loop; four lanes are merged once at the end. Tiles outside the bounds of the block
// (causal, window, packed sequences) are not loaded; tiles outside the bounds of a warp's rows, or hidden by a padding
// mask, are not computed. Blocks with the longest rows start first. Scores are never stored.
//
// Shared memory, bf16, D = 128: 128 query rows (34 KiB) and two tiles of keys (34 KiB), so three blocks of four warps
// fit on a multiprocessor of an H100. By a static estimate (docs/kernels.md) it is bound by issue slots, 2.3 ms for B8
// H32 T4096 D128 bf16, before shared memory (2.0), mma.sync (1.8) and exponentials (1.2); at D = 256 by shared memory.
//
// float32 inputs use fused multiply-adds in float32. Special rows: see csrc/cpu/attention_stats_qk.inc.
#include "attention_stats_qk_hopper.cuh"
#include "qk_lane.cuh"

namespace inflection {
namespace {

template <class S, bool kAll>
__global__ void __launch_bounds__(S::kThreads, S::kSub > 1 ? 3 : 4)
    stats_of_tile(AttentionStatsQkArgs args, QkForm form, int64_t row_tiles, int stages) {
  using T = typename S::Type;
  struct Shared {
    RowBounds<S::kLeft> rows;
    alignas(kCopyBytes) T tiles[1];  // the query rows, then `stages` tiles of keys
  };
  Shared& memory = shared<Shared>();
  T* const queries = memory.tiles;
  T* const keys = queries + S::kLeft * form.pitch;
  const HeadPlace head = HeadPlace::of(args, form, blockIdx.x / row_tiles);
  const int64_t first_row =
      (row_tiles - 1 - blockIdx.x % row_tiles) * S::kLeft;  // under a causal mask the longest first
  memory.rows.template fill<S::kThreads>(args, form, head, first_row);
  const int begin = memory.rows.lowest / S::kRight * S::kRight, end = memory.rows.highest;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto left_row = [&](int s, int h) { return (warp * S::kSub + s) * 16 + h * 8 + lane / kLanesPerRow; };
  QkLane state[S::kSub][2];
  int attended[S::kSub][2] = {};
  float sink[S::kSub][2];  // score of the key that `sink` reports, in the lane that has it
#pragma unroll
  for (int s = 0; s < S::kSub; ++s) sink[s][0] = sink[s][1] = -kInf;

  load_queries<T, S::kLeft, S::kThreads>(queries, args, form, head, first_row);
  if (begin < end) load_keys<T, S::kRight, S::kThreads>(keys, args, form, head, begin);
  commit_copies();
  for (int j = begin, stage = 0; j < end; j += S::kRight) {
    T* const tile = keys + stage * S::kRight * form.pitch;
    if (stages > 1) {
      stage ^= 1;
      if (j + S::kRight < end)
        load_keys<T, S::kRight, S::kThreads>(keys + stage * S::kRight * form.pitch, args, form, head, j + S::kRight);
      commit_copies();
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    const int stop = j + S::kRight < end ? j + S::kRight : end;
    if (memory.rows.touch(warp * 16 * S::kSub, 16 * S::kSub, j, stop) &&
        !hidden_for_all(args, head, memory.rows.mask[0], j, stop)) {
      float c[S::kSub][S::kRightTiles][4];
      multiply<S>(queries, tile, form, c);
      const bool whole = form.plain && memory.rows.cover(j, j + S::kRight);
#pragma unroll
      for (int s = 0; s < S::kSub; ++s) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float score[2 * S::kRightTiles];
#pragma unroll
          for (int i = 0; i < 2 * S::kRightTiles; ++i) score[i] = c[s][i / 2][2 * h + i % 2];
          if (!whole) {
            const int r = left_row(s, h), low = memory.rows.low[r], high = memory.rows.high[r];
            const int64_t mask_row = memory.rows.mask[r];
#pragma unroll
            for (int i = 0; i < 2 * S::kRightTiles; ++i) {
              const int key = j + i / 2 * 8 + lane % kLanesPerRow * 2 + i % 2;
              float slope;
              attended[s][h] += score_of(args, form, mask_row, low, high, key, score[i], score[i], slope);
            }
          } else {
            attended[s][h] += 2 * S::kRightTiles;
          }
          if (j == 0 || args.key_bounds != nullptr) {
            const int at = memory.rows.sink[left_row(s, h)] - j - lane % kLanesPerRow * 2;
#pragma unroll
            for (int i = 0; i < 2 * S::kRightTiles; ++i) sink[s][h] = at == i / 2 * 8 + i % 2 ? score[i] : sink[s][h];
          }
          state[s][h].template push<kAll>(score, form.exponent);
        }
      }
    }
    __syncthreads();
    if (stages == 1 && j + S::kRight < end) {
      load_keys<T, S::kRight, S::kThreads>(tile, args, form, head, j + S::kRight);
      commit_copies();
    }
  }
  wait_for_copies<0>();
#pragma unroll
  for (int s = 0; s < S::kSub; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowPlace row = RowPlace::of(args, form, head, first_row + left_row(s, h));
      write_row(args, form, row, state[s][h], attended[s][h], sink[s][h]);
    }
  }
}

template <class S, bool kAll = true>
int run(const AttentionStatsQkArgs& args, int stages, void* stream) {
  const QkForm form = QkForm::of(args);
  const int64_t row_tiles = ceil_div(args.num_rows * form.group, S::kLeft);
  const int64_t blocks = args.batch * args.kv_heads * row_tiles;
  if (blocks == 0 || args.heads == 0) return cudaSuccess;
  if (blocks > kMostBlocks || args.keys > kMostKeys) return cudaErrorInvalidValue;
  const size_t bytes = sizeof(RowBounds<S::kLeft>) +
                       sizeof(typename S::Type) * form.pitch * static_cast<size_t>(S::kLeft + stages * S::kRight);
  return launch(stats_of_tile<S, kAll>, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads), bytes, stream, args,
                form, row_tiles, stages);
}

}  // namespace

// Uses the largest tiles that leave room for a second block on a multiprocessor, or that fit at all.
int attention_stats_qk_cuda(const AttentionStatsQkArgs& args, void* stream) {
  const HopperUse use = hopper_use();
  if (use == HopperUse::unknown) return cudaErrorInvalidValue;
  if (use != HopperUse::off && hopper_takes(args))
    return attention_stats_qk_hopper_cuda(args, use == HopperUse::split, stream);
  return with_shape(args, [&](auto shape) {
    using T = typename decltype(shape)::Type;
    constexpr int64_t kDeepest = 512 / sizeof(T);  // two tiles of keys beside the rows
    if constexpr (sizeof(T) == 2) {
      if (args.head_dim <= kWholeDepth) {
        return args.out.collision ? run<Shape<T, 2, 4, 8>, true>(args, 2, stream)
                                  : run<Shape<T, 2, 4, 8>, false>(args, 2, stream);
      }
    }
    return run<decltype(shape)>(args, args.head_dim <= kDeepest ? 2 : 1, stream);
  });
}

}  // namespace inflection
