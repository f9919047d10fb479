// Statistics of softmax rows fused from Q and K.
//
// A block takes one tile of query rows of one key head, all heads of its group packed together, and goes over the keys
// in tiles of 64, copied asynchronously one tile ahead. Every lane keeps a state of its own for each row that it holds
// a piece of, so the loop has no exchange between lanes; four lanes are merged once at the end. Tiles outside the
// bounds of the block (causal, window, packed sequences) are not loaded, those outside the bounds of a warp's rows, or
// hidden by a padding mask, are not computed; blocks with the longest rows start first. No score is ever stored.
//
// Shared memory, bf16, D = 128: 128 query rows (34 KiB) and two tiles of keys (34 KiB), so three blocks of four warps
// fit on an H100. By a static estimate (docs/kernels.md) issue slots bound it, 2.3 ms for B8 H32 T4096 D128 bf16,
// before shared memory (2.0), mma.sync (1.8) and exponentials (1.2); at D = 256 shared memory does.
//
// float32 inputs are multiplied in float32 with fused multiply-adds. Odd rows: see csrc/cpu/attention_stats_qk.inc.
#include "core/row_state.h"
#include "qk_tiles.cuh"

namespace inflection {
namespace {

constexpr float kLeastExponent = -127.f;   // 2^x is 0 below
constexpr float kMostReference = 0x1p20f;  // up to which a rounded reference is within 2^-5 of the maximum

// What the sums of a row are centred on, in base 2: x = (score - base) * exponent - reference. A rounded product is as
// good as the maximum where it is small: the sums are exact with respect to it, and x takes one instruction. Where it is
// large x could be anything above 0, so the maximum is subtracted first.
struct Centre {
  float base, reference;

  static __device__ __forceinline__ bool is_large(float max, float exponent) {
    return !(fabsf(max * exponent) <= kMostReference);
  }
  static __device__ __forceinline__ Centre of(float max, float exponent) {
    if (max == -kInf) return {0.f, 0.f};
    return is_large(max, exponent) ? Centre{max, 0.f} : Centre{0.f, max * exponent};
  }
  __device__ __forceinline__ float distance(float score, float exponent) const {
    return at_least(fmaf(score - base, exponent, -reference), kLeastExponent);
  }
};

// One row as one lane sees it.
struct QkLane {
  float max = -kInf;  // of unscaled scores
  float reference = 0.f, sum = 0.f, dot = 0.f, square = 0.f;

  __device__ __forceinline__ void rebase(float highest, float exponent) {
    if (highest == max) return;
    const Centre now = Centre::of(max, exponent), next = Centre::of(highest, exponent);
    float d = at_least(fmaf(now.base - next.base, exponent, now.reference - next.reference), kLeastExponent);
    if (max == -kInf) d = kLeastExponent;
    const float f = exp2_approx(d);
    rebase_sums(d, f, sum, dot, square);
    max = highest;
    reference = next.reference;
  }
  template <bool kAll, bool kLarge>
  __device__ __forceinline__ void add(float score, float exponent) {
    const float x = kLarge ? Centre{max, 0.f}.distance(score, exponent)
                           : at_least(fmaf(score, exponent, -reference), kLeastExponent);
    const float e = exp2_approx(x);
    sum += e;
    dot = fmaf(e, x, dot);
    if (kAll) square = fmaf(e, e, square);
  }
  // The sum of squares is left out where nobody wants it.
  template <bool kAll, int N>
  __device__ __forceinline__ void push(const float (&score)[N], float exponent) {
    float highest = max;
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, score[i]);
    rebase(highest, exponent);
    QkLane part{max, reference};  // from zero: a block of terms rounds less than the whole row
    if (max > -kInf && Centre::is_large(max, exponent)) {
#pragma unroll
      for (int i = 0; i < N; ++i) part.template add<kAll, true>(score[i], exponent);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) part.template add<kAll, false>(score[i], exponent);
    }
    sum += part.sum;
    dot += part.dot;
    if (kAll) square += part.square;
  }
  // Over the lanes that share a row; the result is in all of them.
  __device__ __forceinline__ void merge_lanes(float exponent) {
    float highest = max;
    for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2)
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, lanes));
    rebase(highest, exponent);
    for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      dot += __shfl_xor_sync(kAllLanes, dot, lanes);
      square += __shfl_xor_sync(kAllLanes, square, lanes);
    }
  }
};

__device__ __forceinline__ void write_row(const AttentionStatsQkArgs& args, const QkForm& form, const RowPlace& row,
                                          QkLane state, int keys, float first) {
  RowTotals total{};
  total.max_logit = state.max * form.scale;
  total.empty = state.max == -kInf && state.dot == state.dot;
  int columns = keys;
  if (args.sinks != nullptr) {
    first = args.sinks[row.head];
    if (first != -kInf) {
      ++columns;
      state.rebase(fmaxf(state.max, first), form.exponent);
      if (Centre::is_large(state.max, form.exponent)) state.template add<true, true>(first, form.exponent);
      else state.template add<true, false>(first, form.exponent);
      total.empty = false;
    }
  }
  const Centre centre = Centre::of(state.max, form.exponent);
  total.sum = state.sum, total.log_sum = logf(state.sum), total.dot = kLn2 * state.dot, total.square = state.square;
  total.centre = double(state.max) * form.scale - kLn2 * centre.distance(state.max, form.exponent);
  if (columns == 1) {  // exactly one-hot, as 2^x of a rounded reference is not
    total.square = total.sum * total.sum, total.dot = total.log_sum = 0.0;
    total.centre = double(state.max) * form.scale;
  }
  total.first = first == -kInf ? 0.f : exp2_approx(centre.distance(first, form.exponent));
  total.keys = row.inside ? static_cast<float>(keys) : NAN;
  total.broken = !row.inside || state.dot != state.dot || state.max == kInf;
  report(total, row.out, args.out);
}

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
  float sink[S::kSub][2];  // scores of the keys that `sink` reports, in the lane that has them
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
      state[s][h].merge_lanes(form.exponent);
      for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2)
        attended[s][h] += __shfl_xor_sync(kAllLanes, attended[s][h], lanes),
            sink[s][h] = fmaxf(sink[s][h], __shfl_xor_sync(kAllLanes, sink[s][h], lanes));
      const RowPlace row = RowPlace::of(args, form, head, first_row + left_row(s, h));
      if (lane % kLanesPerRow == 0 && row.there) write_row(args, form, row, state[s][h], attended[s][h], sink[s][h]);
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

// The largest tiles that leave room for a second block on a multiprocessor, or fit at all.
int attention_stats_qk_cuda(const AttentionStatsQkArgs& args, void* stream) {
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
