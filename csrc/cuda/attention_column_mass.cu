// Column sums of probabilities and of their squares, given the log-sum-exp of the rows.
//
// A block keeps a tile of 64 keys of one query head and iterates over the tiles of 64 rows that can attend them. Each lane
// adds up its two of 16 keys, tile by tile, without rounding errors between tiles; four lanes are added once at the end.
// Each number has one writer, so the result is deterministic.
//
// Shared memory, bf16, D = 128: keys and rows, 17 KiB each. One multiply-add, one 2^x and two sums per score. By a static
// estimate (docs/kernels.md) it is bound by issue slots, 5.8 ms for B8 H32 T4096 D128 bf16, before shared memory (3.5) and
// mma.sync (1.8); only one tile is in flight, so its loading latency is added.
//
// A probability is e^(s - lse), at most 1. A row with lse = -inf does not count, a score of -inf has probability 0, NaN
// makes the columns NaN that its row attends.
#include "core/exact_sum.h"
#include "qk_tiles.cuh"

namespace inflection {
namespace {

constexpr float kLeastPower = -127.f;  // 2^x is 0 below
constexpr float kMostLse = 0x1p10f;    // largest lse for which lse * log2(e) may be rounded, by at most 2^-14

// A sum and its rounding error.
struct Sum {
  float high = 0.f, low = 0.f;

  __device__ __forceinline__ void add(float x) { add_exactly(x, high, low); }
  // Over the lanes that share a left row.
  __device__ __forceinline__ float over_lanes() const {
    return static_cast<float>(warp_sum<kLanesPerRow>(double(high) + low));
  }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)  // or the compiler stops at 128 registers and spills
    columns_of_tile(AttentionColumnMassArgs args, QkForm form, int64_t key_tiles) {
  using T = typename S::Type;
  static_assert(S::kSub == 1);
  struct Shared {
    RowBounds<S::kRight> rows;
    RowSpan span;
    float lse[S::kRight];            // +inf for a row that does not count
    float powers[S::kRight];         // lse * log2(e)
    int special;                     // whether an lse is not finite or large, or a row does not exist
    alignas(kCopyBytes) T tiles[1];  // keys, then rows
  };
  const AttentionStatsQkArgs& forward = args.forward;
  Shared& memory = shared<Shared>();
  T* const keys = memory.tiles;
  T* const queries = keys + S::kLeft * form.pitch;
  const HeadPlace head = HeadPlace::of_query_head(forward, blockIdx.x / key_tiles);
  const int64_t first_key = blockIdx.x % key_tiles * S::kLeft;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int own = static_cast<int>(first_key) + warp * 16;  // the warp's first key

  load_keys<T, S::kLeft, S::kThreads>(keys, forward, form, head, first_key);
  commit_copies();
  memory.span.template fill<S::kLeft, S::kThreads>(forward, first_key);
  const int64_t begin = memory.span.first_packed(forward, form, S::kRight);
  const int64_t end = keys_hidden<S::kLeft>(forward, head, first_key) ? begin : memory.span.last_packed(forward, form);
  Sum mass[2], squares[2];
  for (int64_t i = begin; i < end; i += S::kRight) {
    __syncthreads();  // all threads have read the last tile
    if (threadIdx.x == 0) memory.special = 0;
    memory.rows.template fill<S::kThreads>(forward, form, head, i);
    if (memory.rows.lowest >= first_key + S::kLeft || memory.rows.highest <= first_key) continue;
    for (int r = threadIdx.x; r < S::kRight; r += S::kThreads) {
      const RowPlace row = RowPlace::of(forward, form, head, i + r);
      const float lse = row.inside ? args.lse[row.out] : -kInf;
      memory.lse[r] = lse == -kInf ? kInf : lse;
      memory.powers[r] = memory.lse[r] * static_cast<float>(kLog2e);
      if (!(fabsf(lse) <= kMostLse)) atomicMax(&memory.special, 1);
    }
    load_queries<T, S::kRight, S::kThreads>(queries, forward, form, head, i);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (memory.rows.lowest >= own + 16 || memory.rows.highest <= own) continue;
    float c[1][S::kRightTiles][4];
    multiply<S>(keys, queries, form, c);
    const bool whole = form.plain && !memory.special &&
                       memory.rows.cover(static_cast<int>(first_key), static_cast<int>(first_key) + S::kLeft);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float part = 0.f, part_squares = 0.f;
#pragma unroll
      for (int n = 0; n < 2 * S::kRightTiles; ++n) {
        const int r = n / 2 * 8 + lane % kLanesPerRow * 2 + n % 2;
        const float product = c[0][n / 2][2 * h + n % 2];
        float score = product, slope;
        if (!whole) {
          score_of(forward, form, memory.rows.mask[r], memory.rows.low[r], memory.rows.high[r],
                   own + h * 8 + lane / kLanesPerRow, product, score, slope);
        }
        // A large score is rounded as the log-sum-exp was; otherwise the maximum would not have probability 1.
        const float power = whole ? fmaf(score, form.exponent, -memory.powers[r])
                                  : (__fmul_rn(score, form.scale) - memory.lse[r]) * static_cast<float>(kLog2e);
        const float least = at_least(power, kLeastPower);
        float p = exp2_approx(least > 0.f ? 0.f : least);
        if (!whole && (score == -kInf || memory.lse[r] == kInf)) p = 0.f;
        part += p;
        part_squares = fmaf(p, p, part_squares);
      }
      mass[h].add(part);
      squares[h].add(part_squares);
    }
  }
  wait_for_copies<0>();

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t key = own + h * 8 + lane / kLanesPerRow;
    const float total = mass[h].over_lanes(), total_squares = squares[h].over_lanes();
    if (lane % kLanesPerRow != 0 || key >= forward.keys) continue;
    const int64_t at = blockIdx.x / key_tiles * forward.keys + key;
    args.mass[at] = total;
    args.squares[at] = total_squares;
  }
}

template <class S>
int run(const AttentionColumnMassArgs& args, void* stream) {
  using T = typename S::Type;
  const AttentionStatsQkArgs& forward = args.forward;
  QkForm form = QkForm::of(forward);
  form.group = 1;
  const int64_t key_tiles = ceil_div(forward.keys, S::kLeft);
  const int64_t blocks = forward.batch * forward.heads * key_tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMostBlocks || forward.keys > kMostKeys || forward.queries > kMostKeys) return cudaErrorInvalidValue;
  const size_t bytes = sizeof(RowBounds<S::kRight>) + 2 * kCopyBytes + 2 * sizeof(float) * S::kRight +
                       sizeof(T) * form.pitch * static_cast<size_t>(S::kLeft + S::kRight);
  return launch(columns_of_tile<S>, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads), bytes, stream, args, form,
                key_tiles);
}

}  // namespace

int attention_column_mass_cuda(const AttentionColumnMassArgs& args, void* stream) {
  return with_shape(args.forward, [&](auto shape) { return run<decltype(shape)>(args, stream); });
}

}  // namespace inflection
