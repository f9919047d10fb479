// Gradients of the row statistics with respect to Q and K, recomputed from Q, K and the results of the forward pass.
//
// Formulas as in csrc/cpu/attention_stats_qk_backward.inc; scores are formed exactly as in the forward pass. Two kernels
// over the same tiles of scores: one keeps a tile of rows and iterates over the keys, the other keeps a tile of keys and
// iterates over the rows. Each number has one writer, so the result is deterministic. Nothing of size Tq x Tk is stored.
// Tensor cores get dS of 16-bit inputs as two numbers of their dtype, value and remainder; sums are float32.
//
// A block computes at most 128 columns of the gradient; for wider heads the scores are computed again for each 128. By a
// static estimate (docs/kernels.md) both passes are bound by shared memory, 75 KB for 16 x 64 scores at D = 128, before
// issue slots; only one tile is in flight, so its loading latency is added.
#include <type_traits>

#include "core/row_gradient.h"
#include "qk_tiles.cuh"

namespace inflection {
namespace {

constexpr int kOutTiles = 16;  // of 8 columns: 64 registers of sums
constexpr int kOutColumns = 8 * kOutTiles;
constexpr float kLeastLogP = -100.f;  // finite, or 0 * -inf would be NaN; e^x is 0

struct Coefficients {
  RowGradient gradient;
  float lse, lse_low;

  static __device__ __forceinline__ Coefficients of(const AttentionStatsQkBackwardArgs& args, const RowPlace& row) {
    if (!row.inside) return {};
    const float lse = args.rows.lse[row.out];
    return {RowGradient::of(args.rows, row.out, args.forward.scale, !args.forward.has_sinks), lse == -kInf ? 0.f : lse,
            args.rows.lse_low[row.out]};
  }

  // d(loss) / d(product) of an attended key that is not the sink; the score is in units of 1 / `scale`.
  __device__ __forceinline__ float of_score(float score, float scale) const {
    float log_p = at_least(fmaf(score, scale, -lse) - lse_low, kLeastLogP);
    log_p = log_p > 0.f ? 0.f : log_p;
    return gradient.at(exp2_approx(log_p * static_cast<float>(kLog2e)), log_p);
  }
  // The same for any key; `score` and `slope` are those of score_of.
  __device__ __forceinline__ float of_score(float score, float scale, float slope, bool is_sink) const {
    return score == -kInf ? 0.f : (of_score(score, scale) + (is_sink ? gradient.first : 0.f)) * slope;
  }
};

__device__ __forceinline__ bool is_finite(float x) { return x - x == 0.f; }
__device__ __forceinline__ bool is_finite(BF16 x) { return (x.bits & 0x7f80) != 0x7f80; }
__device__ __forceinline__ bool is_finite(F16 x) { return (x.bits & 0x7c00) != 0x7c00; }

// Whether an element of four words is not finite: adding one to its exponent then carries into the sign.
template <class T>
__device__ __forceinline__ bool has_non_finite(const uint4& raw) {
  constexpr unsigned kSigns = sizeof(T) == 4 ? 0x80000000u : 0x80008000u;
  constexpr unsigned kOne = sizeof(T) == 4 ? 0x00800000u : std::is_same_v<T, BF16> ? 0x00800080u : 0x04000400u;
  const auto carried = [](unsigned word) { return (word & ~kSigns) + kOne; };
  return ((carried(raw.x) | carried(raw.y) | carried(raw.z) | carried(raw.w)) & kSigns) != 0;
}

// Replaces non-finite elements by 0. Rows that attend them have NaN in dS already; other rows must not get 0 * NaN.
template <class T, int N, int kThreads>
__device__ __forceinline__ void zero_non_finite(T* tile, const QkForm& form) {
  constexpr int kPerRow = 8, kElements = kCopyBytes / sizeof(T);
  for (int r = threadIdx.x / kPerRow; r < N; r += kThreads / kPerRow) {
    for (int k = threadIdx.x % kPerRow * kElements; k < form.depth; k += kPerRow * kElements) {
      uint4* const at = reinterpret_cast<uint4*>(tile + r * form.pitch + k);
      const uint4 raw = *at;
      if (!has_non_finite<T>(raw)) continue;
      T values[kElements];
      memcpy(values, &raw, sizeof raw);
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        if (!is_finite(values[i])) values[i] = T{};
      uint4 cleaned;
      memcpy(&cleaned, values, sizeof cleaned);
      *at = cleaned;
    }
  }
}

// out[n] += the warp's rows of `left` [kLeft, kRight] times columns [first, first + kOutColumns) of `right` [kRight,
// depth].
template <class S>
__device__ __forceinline__ void add_product(const typename S::Type* left, int left_pitch, const typename S::Type* right,
                                            const QkForm& form, int first, float (&out)[kOutTiles][4]) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto* rows = left + warp * 16 * left_pitch;
  if constexpr (S::kTensorCores) {
    using T = typename S::Type;
    const T* a_row = rows + (lane % 16) * left_pitch + lane / 16 * 8;
    const T* b_row = right + (lane % 16) * form.pitch + first + lane / 16 * 8;
#pragma unroll 1
    for (int k = 0; k < S::kRight; k += kTileAlign) {
      uint32_t a[4];
      ldmatrix(a, a_row + k);
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        if (first + n * 8 >= form.depth) continue;
        uint32_t b[4];
        ldmatrix_transposed(b, b_row + k * form.pitch + n * 8);
        mma<T>(out[n], a, b[0], b[1]);
        mma<T>(out[n + 1], a, b[2], b[3]);
      }
    }
  } else {
    const float* x_row = rows + lane / 4 * left_pitch;
    const float* y_row = x_row + 8 * left_pitch;
    const float* z_row = right + first + lane % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < S::kRight; ++k) {
      const float x = x_row[k], y = y_row[k];
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        if (first + n * 8 >= form.depth) continue;
        const float2 z = *reinterpret_cast<const float2*>(z_row + k * form.pitch + n * 8);
        out[n][0] = fmaf(x, z.x, out[n][0]), out[n][1] = fmaf(x, z.y, out[n][1]);
        out[n][2] = fmaf(y, z.x, out[n][2]), out[n][3] = fmaf(y, z.y, out[n][3]);
      }
    }
  }
}

// dS of a tile in shared memory: its pitch is an odd multiple of 16 bytes; for tensor cores in two pieces.
template <class S>
constexpr int kSlopePitch = S::kRight + kCopyBytes / static_cast<int>(sizeof(typename S::Type));
template <class S>
constexpr int kSlopePieces = S::kTensorCores ? 2 : 1;

// Stores two adjacent elements of dS, for tensor cores as value and remainder.
template <class S>
__device__ __forceinline__ void put_slopes(typename S::Type* to, float a, float b) {
  if constexpr (S::kTensorCores) {
    using T = typename S::Type;
    struct alignas(2 * sizeof(T)) Pair {
      T first, second;
    };
    Pair both, rest;
    const uint32_t bits = pack<T>(a, b);
    memcpy(&both, &bits, sizeof both);
    const uint32_t rest_bits = pack<T>(a - to_float(both.first), b - to_float(both.second));
    memcpy(&rest, &rest_bits, sizeof rest);
    *reinterpret_cast<Pair*>(to) = both;
    *reinterpret_cast<Pair*>(to + S::kLeft * kSlopePitch<S>) = rest;
  } else {
    to[0] = a, to[1] = b;
  }
}

// Least number of blocks per multiprocessor; 0: the compiler decides. For sm_100 it stops at 168 registers and spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class S>
constexpr int kResident = S::kTensorCores ? 0 : 1;
#else
template <class S>
constexpr int kResident = 0;
#endif

// kOfKeys: the left tile has keys and the right tiles have rows, for dK; otherwise the reverse, for dQ.
template <class S, bool kOfKeys>
__global__ void __launch_bounds__(S::kThreads, kResident<S>)
    gradients_of_tile(AttentionStatsQkBackwardArgs args, QkForm form, int64_t left_tiles, int64_t parts) {
  using T = typename S::Type;
  constexpr int kRows = kOfKeys ? S::kRight : S::kLeft;
  constexpr int kPitch = kSlopePitch<S>, kSlopes = S::kLeft * kPitch;
  struct Shared {
    RowBounds<kRows> rows;
    RowSpan span;
    Coefficients coefficients[kRows];
    alignas(kCopyBytes) T slopes[kSlopePieces<S> * kSlopes];
    alignas(kCopyBytes) T tiles[1];  // the left tile, then the right one
  };
  const AttentionStatsQkArgs& forward = args.forward;
  Shared& memory = shared<Shared>();
  T* const left = memory.tiles;
  T* const right = left + S::kLeft * form.pitch;
  const HeadPlace head = HeadPlace::of(forward, form, blockIdx.x / (left_tiles * parts));
  const int64_t first_left = blockIdx.x / parts % left_tiles * S::kLeft;
  const int first_column = static_cast<int>(blockIdx.x % parts) * kOutColumns;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int left_row = warp * 16 + lane / kLanesPerRow;  // and 8 below it

  const auto fill_rows = [&](int64_t first) {
    for (int r = threadIdx.x; r < kRows; r += S::kThreads)
      memory.coefficients[r] = Coefficients::of(args, RowPlace::of(forward, form, head, first + r));
    memory.rows.template fill<S::kThreads>(forward, form, head, first);
  };
  int64_t begin, end;
  if constexpr (kOfKeys) {
    load_keys<T, S::kLeft, S::kThreads>(left, forward, form, head, first_left);
    memory.span.template fill<S::kLeft, S::kThreads>(forward, first_left);
    begin = memory.span.first_packed(forward, form, S::kRight);
    end = keys_hidden<S::kLeft>(forward, head, first_left) ? begin : memory.span.last_packed(forward, form);
  } else {
    load_queries<T, S::kLeft, S::kThreads>(left, forward, form, head, first_left);
    fill_rows(first_left);
    begin = memory.rows.lowest / S::kRight * S::kRight, end = memory.rows.highest;
  }
  commit_copies();

  float out[kOutTiles][4] = {};
  for (int64_t j = begin; j < end; j += S::kRight) {
    __syncthreads();  // all threads have read the last tile
    if constexpr (kOfKeys) {
      fill_rows(j);
      if (memory.rows.lowest >= first_left + S::kLeft || memory.rows.highest <= first_left) continue;
      load_queries<T, S::kRight, S::kThreads>(right, forward, form, head, j);
    } else {
      if (keys_hidden<S::kRight>(forward, head, j)) continue;
      load_keys<T, S::kRight, S::kThreads>(right, forward, form, head, j);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    // Whether any of the warp's 16 left rows attends, or is attended by, any of the right ones.
    const int own = static_cast<int>(first_left) + warp * 16;
    const bool needed = kOfKeys
                            ? memory.rows.lowest < own + 16 && memory.rows.highest > own
                            : memory.rows.touch(warp * 16, 16, static_cast<int>(j), static_cast<int>(j) + S::kRight);
    float c[1][S::kRightTiles][4];
    if (needed) multiply<S>(left, right, form, c);
    const int first_key = static_cast<int>(kOfKeys ? first_left : j);
    const bool whole = forward.mask.data == nullptr && forward.softcap == 0.f &&
                       (args.rows.grad_sink == nullptr || (first_key > 0 && forward.key_bounds == nullptr)) &&
                       memory.rows.cover(first_key, first_key + (kOfKeys ? S::kLeft : S::kRight));
    // of_product(row, key, product): d(loss) / d(product).
    const auto put_tile = [&](const auto& of_product) {
#pragma unroll
      for (int n = 0; n < S::kRightTiles; ++n) {
        const int r = n * 8 + lane % kLanesPerRow * 2;
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int left_at = left_row + i / 2 * 8, right_at = r + i % 2;
          value[i] = of_product(kOfKeys ? right_at : left_at, first_key + (kOfKeys ? left_at : right_at), c[0][n][i]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
          put_slopes<S>(memory.slopes + (left_row + h * 8) * kPitch + r, value[2 * h], value[2 * h + 1]);
      }
    };
    if (needed && whole) {
      put_tile([&](int row, int, float product) {
        return memory.coefficients[row].of_score(product * form.factor, form.scale);
      });
    } else if (needed) {
      put_tile([&](int row, int key, float product) {
        float score, slope;
        score_of(forward, form, memory.rows.mask[row], memory.rows.low[row], memory.rows.high[row], key, product, score,
                 slope);
        return memory.coefficients[row].of_score(score, form.scale, slope, key == memory.rows.sink[row]);
      });
    }
    __syncthreads();
    zero_non_finite<T, S::kRight, S::kThreads>(right, form);
    __syncthreads();
#pragma unroll
    for (int piece = 0; needed && piece < kSlopePieces<S>; ++piece)
      add_product<S>(memory.slopes + piece * kSlopes, kPitch, right, form, first_column, out);
  }
  wait_for_copies<0>();

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t l = first_left + left_row + h * 8;
    float* to = nullptr;
    if constexpr (kOfKeys) {
      if (l < forward.keys)
        to = args.grad_key + ((head.batch * forward.kv_heads + head.kv_head) * forward.keys + l) * forward.head_dim;
    } else {
      const RowPlace row = RowPlace::of(forward, form, head, l);
      if (row.exists) to = args.grad_query + row.out * forward.head_dim;
    }
    if (to == nullptr) continue;
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = first_column + n * 8 + lane % kLanesPerRow * 2 + e;
        if (column < forward.head_dim) to[column] = out[n][2 * h + e];
      }
    }
  }
}

template <class S, bool kOfKeys>
int run(const AttentionStatsQkBackwardArgs& args, void* stream) {
  using T = typename S::Type;
  const AttentionStatsQkArgs& forward = args.forward;
  const QkForm form = QkForm::of(forward);
  const int64_t left = kOfKeys ? forward.keys : forward.num_rows * form.group;
  const int64_t left_tiles = ceil_div(left, S::kLeft), parts = ceil_div(forward.head_dim, kOutColumns);
  const int64_t blocks = forward.batch * forward.kv_heads * left_tiles * parts;
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMostBlocks || forward.keys > kMostKeys || forward.queries > kMostKeys) return cudaErrorInvalidValue;
  constexpr int kRows = kOfKeys ? S::kRight : S::kLeft;
  constexpr size_t kSlopes = sizeof(T) * kSlopePieces<S> * S::kLeft * kSlopePitch<S>;
  const size_t bytes = sizeof(RowBounds<kRows>) + kCopyBytes + sizeof(Coefficients) * kRows + kSlopes +
                       sizeof(T) * form.pitch * static_cast<size_t>(S::kLeft + S::kRight);
  return launch(gradients_of_tile<S, kOfKeys>, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads), bytes, stream,
                args, form, left_tiles, parts);
}

}  // namespace

int attention_stats_qk_grad_query_cuda(const AttentionStatsQkBackwardArgs& args, void* stream) {
  return with_shape(args.forward, [&](auto shape) { return run<decltype(shape), false>(args, stream); });
}

int attention_stats_qk_grad_key_cuda(const AttentionStatsQkBackwardArgs& args, void* stream) {
  return with_shape(args.forward, [&](auto shape) { return run<decltype(shape), true>(args, stream); });
}

}  // namespace inflection
