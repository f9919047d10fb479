// Tiles of scores from Q and K, shared by the forward and the backward pass.
//
// A block keeps one tile of kLeft rows in shared memory and iterates over tiles of kRight rows. Each warp multiplies 16
// kSub of the left rows by all right rows: 16-bit inputs on tensor cores, float32 inputs by fused multiply-adds. Both have
// the same layout of results: in tile (s, n) of a warp, lane (g, t) holds left rows 16 s + g and 16 s + g + 8 and right
// rows 8 n + 2t and 8 n + 2t + 1.
//
// The pitch of a shared tile is an odd multiple of 16 bytes, so that eight rows lie in different banks.
#pragma once

#include "core/score_form.h"
#include "exponential.cuh"
#include "mask.cuh"
#include "mma.cuh"

namespace inflection {

constexpr int kTileAlign = 16;  // the depth is padded with zeros to a multiple of this: one mma
constexpr int kCopyBytes = 16;  // of one asynchronous copy
constexpr int kDepthPart = 64;  // length of a sum of products: short sums have smaller rounding errors, and tensor
                                // cores truncate
// Up to this depth all kernels sum 16-bit products in one piece, because kernels with kSub > 1 have no registers for a
// second sum, and all kernels have to form the same scores.
constexpr int kWholeDepth = 128;
constexpr int64_t kMostBlocks = 0x7fffffff;  // of one launch
constexpr int kLanesPerRow = 4;              // lanes that share a left row

template <class T, int kSub_, int kWarps_, int kRightTiles_>
struct Shape {
  using Type = T;
  static constexpr int kSub = kSub_, kWarps = kWarps_, kRightTiles = kRightTiles_;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kLeft = 16 * kSub * kWarps;
  static constexpr int kRight = 8 * kRightTiles;
  static constexpr bool kTensorCores = sizeof(T) == 2;
};

// Calls body(Shape{}) with the tile shape for an input.
template <class Body>
int with_shape(const AttentionStatsQkArgs& args, const Body& body) {
  return for_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == sizeof(float))
      if (args.head_dim > 256) return body(Shape<T, 1, 2, 4>{});
    return body(Shape<T, 1, 4, 8>{});
  });
}

// How scores are formed from dot products.
struct QkForm {
  float factor;  // products are multiplied by it: 1, -1, or the whole scale under an additive mask, a softcap or sinks
  float scale;   // what remains to be multiplied by, > 0
  float exponent;  // scale * log2(e)
  float softcap;   // 0: none
  bool plain;      // products are the unscaled scores
  bool vector;     // rows can be copied 16 bytes at a time
  int pitch;       // elements between rows of a shared tile
  int depth;       // head dimension, padded to kTileAlign
  int group;       // number of query heads whose rows are packed: all that share a key head, or one

  static QkForm of(const AttentionStatsQkArgs& args) {
    const bool keep = !is_additive(args.mask) && args.softcap == 0.f && !args.has_sinks && !args.sinks;
    const ScoreScale scale = ScoreScale::of(args.scale, keep);
    QkForm form{};
    form.factor = static_cast<float>(scale.factor);
    form.scale = static_cast<float>(scale.scale);
    form.exponent = static_cast<float>(form.scale * kLog2e);
    form.softcap = args.softcap;
    form.plain = form.factor == 1.f && args.mask.data == nullptr && args.softcap == 0.f;
    const int64_t size = args.dtype == DType::f32 ? 4 : 2;
    form.depth = static_cast<int>(ceil_div(args.head_dim, kTileAlign) * kTileAlign);
    form.pitch = form.depth + static_cast<int>(kCopyBytes / size);
    form.group = static_cast<int>(args.heads / (args.kv_heads ? args.kv_heads : 1));
    const auto whole = [size](int64_t elements) { return elements * size % kCopyBytes == 0; };
    form.vector = whole(args.head_dim) && args.query_strides[3] == 1 && args.key_strides[3] == 1 &&
                  reinterpret_cast<uintptr_t>(args.query) % kCopyBytes == 0 &&
                  reinterpret_cast<uintptr_t>(args.key) % kCopyBytes == 0;
    for (int d = 0; d < 3; ++d) form.vector = form.vector && whole(args.query_strides[d]) && whole(args.key_strides[d]);
    return form;
  }
};

// One key head of one sequence. Its query rows are packed: the heads of the group at one position are adjacent.
struct HeadPlace {
  int64_t batch, kv_head, first_head, packed_rows;

  static __device__ __forceinline__ HeadPlace of(const AttentionStatsQkArgs& args, const QkForm& form, int64_t item) {
    const int64_t kv_head = item % args.kv_heads;
    return {item / args.kv_heads, kv_head, kv_head * form.group, args.num_rows * form.group};
  }
  // One query head, for form.group == 1.
  static __device__ __forceinline__ HeadPlace of_query_head(const AttentionStatsQkArgs& args, int64_t item) {
    const int64_t head = item % args.heads;
    return {item / args.heads, head / (args.heads / args.kv_heads), head, args.num_rows};
  }
};

struct RowPlace {
  int64_t position, head, out;  // `out` in [B, H, num_rows]
  int low, high;                // keys within causal and window bounds and the row's sequence; none if the position is
                                // out of range
  int sink;                     // the key that `sink` reports; -1 if it is not among them
  bool exists, inside;          // the packed row exists; its position is in range

  static __device__ __forceinline__ RowPlace of(const AttentionStatsQkArgs& args, const QkForm& form,
                                                const HeadPlace& head, int64_t packed) {
    RowPlace row{};
    row.sink = -1;
    row.exists = packed < head.packed_rows;
    if (!row.exists) return row;
    const int64_t i = packed / form.group;
    row.head = head.first_head + (packed - i * form.group);
    row.out = (head.batch * args.heads + row.head) * args.num_rows + i;
    row.position = args.rows ? args.rows[i] : i;
    row.inside = row.position >= 0 && row.position < args.queries;
    if (!row.inside) return row;
    const auto [low, high] = keys_of_row(args, row.position);
    row.low = static_cast<int>(low), row.high = static_cast<int>(high);
    row.sink = low < high && sink_key(args, row.position) == low ? row.low : -1;
    return row;
  }
};

// Bounds of the rows of a tile, in shared memory.
template <int N>
struct RowBounds {
  int low[N], high[N], sink[N];
  int64_t mask[N];                                // offset of the row in the mask
  int lowest, highest, highest_low, lowest_high;  // over the rows that exist; highest <= lowest: nothing to attend

  // Has two barriers. The old contents must no longer be in use; the new ones are visible to all threads.
  template <int kThreads>
  __device__ __forceinline__ void fill(const AttentionStatsQkArgs& args, const QkForm& form, const HeadPlace& head,
                                       int64_t first) {
    if (threadIdx.x == 0) lowest = lowest_high = static_cast<int>(args.keys), highest = highest_low = 0;
    __syncthreads();
    for (int r = threadIdx.x; r < N; r += kThreads) {
      const RowPlace row = RowPlace::of(args, form, head, first + r);
      low[r] = row.low, high[r] = row.high, sink[r] = row.sink;
      mask[r] =
          head.batch * args.mask.strides[0] + row.head * args.mask.strides[1] + row.position * args.mask.row_stride;
      if (!row.inside) continue;
      atomicMax(&highest_low, row.low), atomicMin(&lowest_high, row.high);
      if (row.high > row.low) atomicMin(&lowest, row.low), atomicMax(&highest, row.high);
    }
    __syncthreads();
  }
  // Whether the bounds of all existing rows include all of these keys.
  __device__ __forceinline__ bool cover(int begin, int end) const { return highest_low <= begin && end <= lowest_high; }
  // Whether the bounds of any of the rows [first, first + count) include any of these keys. The same in all lanes.
  __device__ __forceinline__ bool touch(int first, int count, int begin, int end) const {
    bool any = false;
    for (int r = first + static_cast<int>(threadIdx.x % kWarpSize); r < first + count; r += kWarpSize)
      any = any || (low[r] < end && high[r] > begin && low[r] < high[r]);
    return __any_sync(kAllLanes, any);
  }
};

// Positions [begin, end) of the rows that attend a key of a tile, in shared memory.
struct RowSpan {
  int begin, end;

  // Has two barriers.
  template <int N, int kThreads>
  __device__ __forceinline__ void fill(const AttentionStatsQkArgs& args, int64_t first_key) {
    const int queries = static_cast<int>(args.queries);
    if (threadIdx.x == 0) begin = queries, end = 0;
    __syncthreads();
    for (int64_t key = first_key + threadIdx.x; key < first_key + N && key < args.keys; key += kThreads) {
      const auto [low, high] = rows_of_key(args, key);
      if (low < high) atomicMin(&begin, static_cast<int>(low)), atomicMax(&end, static_cast<int>(high));
    }
    __syncthreads();
  }
  // As packed rows, in whole tiles of `tile` rows. Chosen rows (args.rows) are in any order, so all of them are included.
  __device__ __forceinline__ int64_t first_packed(const AttentionStatsQkArgs& args, const QkForm& form,
                                                  int tile) const {
    return args.rows ? 0 : int64_t{begin} * form.group / tile * tile;
  }
  __device__ __forceinline__ int64_t last_packed(const AttentionStatsQkArgs& args, const QkForm& form) const {
    return (args.rows ? args.num_rows : int64_t{end}) * form.group;
  }
};

// ---- loading --------------------------------------------------------------------------------------------------------

// Loads N rows into a shared tile. row_at(r) is the address of a row, or null for a row of zeros. Eight threads per row.
// The loops are short: unrolling them would cost more than it saves.
template <class T, int N, int kThreads, class RowAt>
__device__ __forceinline__ void load_tile(T* tile, const QkForm& form, int64_t head_dim, int64_t col_stride,
                                          const RowAt& row_at) {
  constexpr int kPerRow = 8, kElements = kCopyBytes / sizeof(T);
#pragma unroll 1
  for (int r = threadIdx.x / kPerRow; r < N; r += kThreads / kPerRow) {
    const T* row = row_at(r);
    T* to = tile + r * form.pitch;
    if (form.vector) {
#pragma unroll 1
      for (int k = threadIdx.x % kPerRow * kElements; k < form.depth; k += kPerRow * kElements) {
        const bool exists = row != nullptr && k < head_dim;
        copy_async(to + k, exists ? row + k : tile, exists);
      }
    } else {
#pragma unroll 1
      for (int k = threadIdx.x % kPerRow; k < form.depth; k += kPerRow)
        to[k] = row != nullptr && k < head_dim ? row[k * col_stride] : T{};
    }
  }
}

// Keys have a constant stride: three instructions per address, where rows in any order take forty.
template <class T, int N, int kThreads>
__device__ __forceinline__ void load_keys(T* tile, const AttentionStatsQkArgs& args, const QkForm& form,
                                          const HeadPlace& head, int64_t first) {
  const T* keys =
      static_cast<const T*>(args.key) + head.batch * args.key_strides[0] + head.kv_head * args.key_strides[1];
  if (form.vector) {
    constexpr int kPerRow = 8, kElements = kCopyBytes / sizeof(T), kStep = kThreads / kPerRow;
    const int r = threadIdx.x / kPerRow, width = static_cast<int>(args.head_dim);
    const int64_t step = kStep * args.key_strides[2], remaining = args.keys - first;
    const int left = (remaining < N ? static_cast<int>(remaining) : N) - r;
#pragma unroll 1
    for (int k = threadIdx.x % kPerRow * kElements; k < form.depth; k += kPerRow * kElements) {
      const T* from = keys + (first + r) * args.key_strides[2] + k;
      T* to = tile + r * form.pitch + k;
#pragma unroll
      for (int i = 0; i < N; i += kStep, from += step, to += kStep * form.pitch)
        copy_async(to, from, i < left && k < width);  // reads nothing beyond the last key
    }
    return;
  }
  load_tile<T, N, kThreads>(tile, form, args.head_dim, args.key_strides[3], [&](int r) -> const T* {
    return first + r < args.keys ? keys + (first + r) * args.key_strides[2] : nullptr;
  });
}

template <class T, int N, int kThreads>
__device__ __forceinline__ void load_queries(T* tile, const AttentionStatsQkArgs& args, const QkForm& form,
                                             const HeadPlace& head, int64_t first) {
  const T* queries = static_cast<const T*>(args.query) + head.batch * args.query_strides[0];
  load_tile<T, N, kThreads>(tile, form, args.head_dim, args.query_strides[3], [&](int r) -> const T* {
    const RowPlace row = RowPlace::of(args, form, head, first + r);
    return row.inside ? queries + row.head * args.query_strides[1] + row.position * args.query_strides[2] : nullptr;
  });
}

// ---- products -------------------------------------------------------------------------------------------------------

// c[s][n] = the warp's left rows times the right ones, over the depth.
template <class S>
__device__ __forceinline__ void multiply(const typename S::Type* left, const typename S::Type* right,
                                         const QkForm& form, float (&c)[S::kSub][S::kRightTiles][4]) {
  using T = typename S::Type;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const T* rows = left + warp * 16 * S::kSub * form.pitch;
#pragma unroll
  for (int s = 0; s < S::kSub; ++s)
#pragma unroll
    for (int n = 0; n < S::kRightTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[s][n][i] = 0.f;
  if constexpr (S::kTensorCores) {
    const T* a_row = rows + (lane % 16) * form.pitch + lane / 16 * 8;
    const T* b_row = right + (lane / 16 * 8 + lane % 8) * form.pitch + lane / 8 % 2 * 8;
    const auto multiply_part = [&](int begin, int end, float (&sums)[S::kSub][S::kRightTiles][4]) {
#pragma unroll 2
      for (int k = begin; k < end; k += kTileAlign) {
        uint32_t a[S::kSub][4];
#pragma unroll
        for (int s = 0; s < S::kSub; ++s) ldmatrix(a[s], a_row + s * 16 * form.pitch + k);
#pragma unroll
        for (int n = 0; n < S::kRightTiles; n += 2) {
          uint32_t b[4];
          ldmatrix(b, b_row + n * 8 * form.pitch + k);
#pragma unroll
          for (int s = 0; s < S::kSub; ++s) {
            mma<T>(sums[s][n], a[s], b[0], b[1]);
            mma<T>(sums[s][n + 1], a[s], b[2], b[3]);
          }
        }
      }
    };
    if constexpr (S::kSub > 1) {  // the depth is at most kWholeDepth
      multiply_part(0, form.depth, c);
    } else {
      const int step = form.depth <= kWholeDepth ? form.depth : kDepthPart;
      for (int begin = 0; begin < form.depth; begin += step) {
        float part[1][S::kRightTiles][4] = {};
        multiply_part(begin, begin + step < form.depth ? begin + step : form.depth, part);
#pragma unroll
        for (int n = 0; n < S::kRightTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) c[0][n][i] += part[0][n][i];
      }
    }
  } else {
    static_assert(S::kSub == 1);
    const float* a_row = rows + lane / 4 * form.pitch;
    const float* b_row = right + lane % 4 * 2 * form.pitch;
    const int parts = (form.depth + kDepthPart - 1) / kDepthPart, step = (form.depth / 4 + parts - 1) / parts * 4;
    for (int begin = 0; begin < form.depth; begin += step) {
      float part[S::kRightTiles][4] = {};
      const int end = begin + step < form.depth ? begin + step : form.depth;
#pragma unroll 1
      for (int k = begin; k < end; k += 4) {
        const float4 x = *reinterpret_cast<const float4*>(a_row + k);
        const float4 y = *reinterpret_cast<const float4*>(a_row + 8 * form.pitch + k);
#pragma unroll
        for (int n = 0; n < S::kRightTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float4 z = *reinterpret_cast<const float4*>(b_row + (n * 8 + e) * form.pitch + k);
            part[n][e] = fmaf(x.w, z.w, fmaf(x.z, z.z, fmaf(x.y, z.y, fmaf(x.x, z.x, part[n][e]))));
            part[n][2 + e] = fmaf(y.w, z.w, fmaf(y.z, z.z, fmaf(y.y, z.y, fmaf(y.x, z.x, part[n][2 + e]))));
          }
        }
      }
#pragma unroll
      for (int n = 0; n < S::kRightTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[0][n][i] += part[n][i];
    }
  }
}

// ---- masks ----------------------------------------------------------------------------------------------------------

// Whether a mask that is the same for all rows of the tile hides all keys of [begin, end), so that the tile can be skipped.
// The same in all warps.
__device__ __forceinline__ bool hidden_for_all(const AttentionStatsQkArgs& args, const HeadPlace& head,
                                               int64_t mask_row, int begin, int end) {
  const Mask& mask = args.mask;
  if (mask.data == nullptr || mask.row_stride != 0 || mask.strides[1] != 0) return false;
  bool any = false;
  for (int j = begin + static_cast<int>(threadIdx.x % kWarpSize); j < end; j += kWarpSize) {
    float bias;
    any = any || attends(mask, mask_row + j * mask.col_stride, bias);
  }
  return !__any_sync(kAllLanes, any);
}

// The same for the N keys of a tile.
template <int N>
__device__ __forceinline__ bool keys_hidden(const AttentionStatsQkArgs& args, const HeadPlace& head,
                                            int64_t first_key) {
  const int64_t last = first_key + N < args.keys ? first_key + N : args.keys;
  return hidden_for_all(args, head, head.batch * args.mask.strides[0], static_cast<int>(first_key),
                        static_cast<int>(last));
}

// The score of one dot product, in units of 1 / form.scale, and the slope of the softcap. Returns whether it is attended.
__device__ __forceinline__ bool score_of(const AttentionStatsQkArgs& args, const QkForm& form, int64_t mask_row,
                                         int low, int high, int key, float product, float& score, float& slope) {
  score = -kInf;
  slope = 1.f;
  if (key < low || key >= high) return false;
  float bias = 0.f;
  if (args.mask.data != nullptr && !attends(args.mask, mask_row + key * args.mask.col_stride, bias)) return false;
  score = product * form.factor;
  if (form.softcap > 0.f) {
    score = softcapped(score, form.softcap, slope, [](float x) { return tanhf(x); });
  }
  score += bias;
  return true;
}

}  // namespace inflection
