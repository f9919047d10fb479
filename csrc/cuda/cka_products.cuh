// The products of linear CKA: tiles of the Gram matrix of (u, v), added up over the rows.
//
// float32 rows: fused multiply-adds, 128 x 128 results per block, 8 x 8 per thread, added to the float64 Gram matrix every
// cka_rows_at_once rows; it stays in the L2 cache meanwhile. Bound by multiply-adds: one row takes a multiprocessor 128
// cycles, its loads from shared memory 64.
//
// 16-bit rows: tensor cores, 256 x 128 results per block, 64 x 64 per warp, three stages of 32 rows in shared memory (83
// KiB), one block per multiprocessor. The number subtracted from a column must leave its elements exact in 16 bits. It is 0
// if the mean is small compared with the standard deviation, else the mean rounded to 16 bits: the difference of two
// numbers within a factor of two of each other is exact, and few elements are rounded. With u = w + e, where w is
// multiplied and e is the subtracted number less the shift, and with the column sums t of u,
// sum u_i u_j = sum w_i w_j + e_i t_j + t_i e_j - n e_i e_j, in float64.
//
// Estimated cycles of an H100 multiprocessor per 16 rows of a tile: tensor cores at full rate 256, through mma.sync (about
// 62 % of it) 413; shared memory, 32 KiB read and 12 KiB written, 344; issue slots, 8 warps with 32 mma, 32 subtractions
// and 8 ldmatrix on 4 schedulers, 144. The L2 cache has to deliver 12 KiB to each of 132 multiprocessors: 6.9 TB/s in 413
// cycles, more than the reported 5.5 to 6, so it is the bound: 480 to 510 cycles. At the end a tile writes or adds 256 KiB,
// which overlaps with nothing: 8 or 16 % of 8192 rows. An A100 is bound by tensor cores (512 cycles).
#pragma once

#include "cka_rows.cuh"
#include "mma.cuh"

namespace inflection {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // its compiler reorders more, and so spills sooner
constexpr int kFloatBlocks = 1, kStepsAtOnce = 1;
#else
constexpr int kFloatBlocks = 2;  // per multiprocessor: one multiplies while the other adds to the Gram matrix
constexpr int kStepsAtOnce = 2;  // unrolled steps of 16 rows on tensor cores
#endif

constexpr int kOwn = 8;  // rows and columns of a tile per thread, without tensor cores
constexpr int kAcross = kPanel / kOwn;
static_assert(kAcross * kAcross == kCkaThreads);

// Row or column i of the thread with index `at` in this direction: two runs of four, so that a warp's loads of 16 bytes
// from shared memory are adjacent.
__device__ __forceinline__ int owned(int at, int i) { return i / 4 * (kPanel / 2) + at * 4 + i % 4; }

// Adds the sums of the threads to the Gram matrix, or writes them if the sums begin. Loads the old values of a row
// together.
template <class Sum>
__device__ __forceinline__ void add_tile(const Layer& layer, const Panel& left, const Panel& right,
                                         const Sum (&sums)[kOwn][kOwn], bool begins) {
  const int at_row = threadIdx.x / kAcross, at_col = threadIdx.x % kAcross;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int row = owned(at_row, i);
    double* const to = layer.row(kCkaHead + left.first + row) + kCkaHead + right.first;
    double old[kOwn];
    const auto exists = [&](int col) {
      return row < left.columns && col < right.columns && right.first + col >= left.first + row;
    };
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int col = owned(at_col, j);
      old[j] = exists(col) && !begins ? to[col] : 0.0;
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int col = owned(at_col, j);
      if (exists(col)) to[col] = old[j] + sums[i][j];
    }
  }
}

// The products of one row of both panels.
template <class Sum>
__device__ __forceinline__ void multiply_row(const Sum* left, const Sum* right, Sum (&sums)[kOwn][kOwn]) {
  const int at_row = threadIdx.x / kAcross, at_col = threadIdx.x % kAcross;
  Sum a[kOwn], b[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) a[i] = left[owned(at_row, i)], b[i] = right[owned(at_col, i)];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) sums[i][j] = fma(a[i], b[j], sums[i][j]);
}

// ---- float32 rows -------------------------------------------------------------------------------------------------

constexpr int kFloatRows = 8;            // of a stage: a thread loads 8 values while the previous ones are multiplied
constexpr int kFloatPitch = kPanel + 4;  // floats; keeps loads of 16 bytes aligned

struct FloatMemory {
  alignas(16) float stages[2][2][kFloatRows][kFloatPitch];  // stage, panel
  Panel sides[2];                                           // in shared memory to save registers
};

__global__ void __launch_bounds__(kCkaThreads, kFloatBlocks)
    add_float_products(CkaPushArgs args, Layers layers, int64_t panels, int64_t tiles) {
  FloatMemory& memory = shared<FloatMemory>();
  const Layer layer = Layer::of(args, layers, blockIdx.x / tiles);
  int64_t left = 0, right = 0;
  if (!Tiles<1>::at(panels, blockIdx.x % tiles, left, right)) return;
  if (args.float_rows[layer.index] == 0.0 && !args.fresh) return;
  if (threadIdx.x < 2) memory.sides[threadIdx.x] = Panel::of(args, layer, threadIdx.x ? right : left);
  __syncthreads();
  const auto& sides = memory.sides;
  const int of_stage = threadIdx.x / (kPanel / 4), own = threadIdx.x % (kPanel / 4) * 4;
  static_assert(kCkaThreads / (kPanel / 4) == kFloatRows);

  float next[2][4];  // by panel: values of the next stage
  const auto fetch = [&](int64_t first) {
    const int64_t row = first + of_stage;
    const bool counts = row < args.rows && layer.kinds[row] == kInFloat;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      if (counts) sides[p].read(row, own, next[p]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool exists = counts && own + e < sides[p].columns;
        next[p][e] = exists ? next[p][e] - layer.shift[sides[p].first + own + e] : 0.f;
      }
    }
  };
  int stage = 0;
  fetch(0);
  const int64_t run = cka_rows_at_once(args.rows);
  for (int64_t first = 0; first < args.rows; first += run) {
    const int64_t end = first + run < args.rows ? first + run : args.rows;
    float sums[kOwn][kOwn] = {};
    for (int64_t begin = first; begin < end; begin += kFloatRows) {
      auto& rows = memory.stages[stage];
#pragma unroll
      for (int p = 0; p < 2; ++p) memcpy(&rows[p][of_stage][own], next[p], sizeof next[p]);
      __syncthreads();
      fetch(begin + kFloatRows);
#pragma unroll 2
      for (int r = 0; r < kFloatRows; ++r) multiply_row(rows[0][r], rows[1][r], sums);
      stage ^= 1;
    }
    add_tile(layer, sides[0], sides[1], sums, args.fresh && first == 0);
  }
}

// ---- 16-bit rows --------------------------------------------------------------------------------------------------

constexpr int kLeftPanels = 2;
constexpr int kTilePanels = kLeftPanels + 1;
constexpr int kSlab = 32;               // rows of a stage
constexpr int kStages = 3;              // two are being copied: 1600 cycles ahead
constexpr int kHalfPitch = kPanel + 8;  // elements: eight rows of 16 bytes lie in different banks
constexpr int kWarpTile = 64;           // rows and columns of the tile of a warp
constexpr int kSubs = kWarpTile / 16, kRights = kWarpTile / 8;
constexpr int kTogether = 2;  // pairs of old sums that a thread loads at a time
constexpr int kChunk = 8;     // elements of one copy
constexpr int kChunksOfRow = kPanel / kChunk;
constexpr int kCopyRows = kCkaThreads / kChunksOfRow;  // rows that the block copies at a time
constexpr int kSlabsOfRun = 128;  // slabs summed in float32: tensor cores truncate 2^-24 per 16 rows on average
static_assert(kLeftPanels * kPanel / kWarpTile * (kPanel / kWarpTile) == kCkaWarps);

template <class T>
struct HalfMemory {
  alignas(16) T stages[kStages][kTilePanels][kSlab][kHalfPitch];
  double sums[kTilePanels][kPanel];   // of u over the rows
  double rests[kTilePanels][kPanel];  // the subtracted number, less the shift
  Panel sides[kTilePanels];           // in shared memory to save registers, as the next two
  double rows;                        // number of rows that are multiplied
  const T* shifts[kTilePanels];
};

// One warp's share of a slab: c[s][n] += left rows times right columns.
template <class T>
__device__ __forceinline__ void multiply_slab(const T (&left)[kSlab][kHalfPitch], const T (&right)[kSlab][kHalfPitch],
                                              int row0, int col0, const uint32_t (&of_left)[kSubs][2],
                                              const uint32_t (&of_right)[kRights], float (&c)[kSubs][kRights][4]) {
  const int lane = threadIdx.x % kWarpSize, r = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll kStepsAtOnce
  for (int k = 0; k < kSlab; k += 16) {
    uint32_t a[kSubs][4];
#pragma unroll
    for (int s = 0; s < kSubs; ++s) {
      ldmatrix_transposed(a[s], &left[k + high + r][row0 + s * 16 + low]);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][i] = minus<T>(a[s][i], of_left[s][i % 2]);
    }
#pragma unroll
    for (int n = 0; n < kRights; n += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, &right[k + low + r][col0 + n * 8 + high]);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = minus<T>(b[i], of_right[n + i / 2]);
#pragma unroll
      for (int s = 0; s < kSubs; ++s) {
        mma<T>(c[s][n], a[s], b[0], b[1]);
        mma<T>(c[s][n + 1], a[s], b[2], b[3]);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kCkaThreads, 1)
    add_half_products(CkaPushArgs args, Layers layers, int64_t panels, int64_t tiles) {
  HalfMemory<T>& memory = shared<HalfMemory<T>>();
  const Layer layer = Layer::of(args, layers, blockIdx.x / tiles);
  int64_t left = 0, right = 0;
  if (!Tiles<kLeftPanels>::at(panels, blockIdx.x % tiles, left, right)) return;
  if (args.float_rows[layer.index] == 0.0 && !args.fresh) return;

  // Panels, their shifts and the corrections. A second left panel that does not exist, or that lies below the diagonal,
  // has no columns.
  if (threadIdx.x == 0) memory.rows = args.float_rows[layer.index];
  if (threadIdx.x < kTilePanels) {
    int64_t number = threadIdx.x == kLeftPanels ? right : left + threadIdx.x;
    const bool exists = number <= right;
    number = exists ? number : right;
    memory.sides[threadIdx.x] = Panel::of(args, layer, number);
    if (!exists) memory.sides[threadIdx.x].columns = 0;
    memory.shifts[threadIdx.x] =
        reinterpret_cast<const T*>(args.column_shifts) + (layer.index * panels + number) * kPanel;
  }
  __syncthreads();
  const auto& sides = memory.sides;
  const auto& shifts = memory.shifts;
  for (int i = threadIdx.x; i < kTilePanels * kPanel; i += kCkaThreads) {
    const int p = i / kPanel, col = i % kPanel;
    const int64_t at = sides[p].first + col;
    const bool inside = col < sides[p].columns;
    memory.sums[p][col] = inside ? args.column_sums[layer.index * (layer.k - kCkaHead) + at] : 0.0;
    memory.rests[p][col] = inside ? double(to_float(shifts[p][col])) - double(layer.shift[at]) : 0.0;
  }

  // A row that is not multiplied here is replaced by the shifts, so that it becomes zeros.
  const int copy_row = threadIdx.x / kChunksOfRow, copy_col = threadIdx.x % kChunksOfRow * kChunk;
  constexpr int kRowsOfThread = kSlab / kCopyRows;
  uint8_t kinds[kRowsOfThread];
  const auto fetch_kinds = [&](int slab) {  // one slab ahead: the address of a copy must not wait for memory
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int64_t row = int64_t{slab} * kSlab + i * kCopyRows + copy_row;
      kinds[i] = row < args.rows ? layer.kinds[row] : uint8_t{kNotCounted};
    }
  };
  const auto copy = [&](int slab) {
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int r = i * kCopyRows + copy_row;
      const int64_t row = int64_t{slab} * kSlab + r;
#pragma unroll
      for (int p = 0; p < kTilePanels; ++p) {
        T* const to = &memory.stages[slab % kStages][p][r][copy_col];
        const bool from_rows = kinds[i] == kInFloat && copy_col < sides[p].columns;
        if (!from_rows || (sides[p].vector && copy_col + kChunk <= sides[p].columns)) {
          copy_async(to, from_rows ? sides[p].template at<T>(row, copy_col) : shifts[p] + copy_col, true);
        } else {
          for (int e = 0; e < kChunk; ++e)
            to[e] = copy_col + e < sides[p].columns ? *sides[p].template at<T>(row, copy_col + e) : T{};
        }
      }
    }
    fetch_kinds(slab + 1);
  };

  const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  const int second = warp / 4, row0 = warp / 2 % 2 * kWarpTile, col0 = warp % 2 * kWarpTile;
  const bool useful = sides[second].columns > row0 && sides[2].columns > col0 &&
                      sides[2].first + col0 + kWarpTile > sides[second].first + row0;
  const auto twice = [](T shift) { return shift.bits * 0x10001u; };
  uint32_t of_left[kSubs][2], of_right[kRights];
#pragma unroll
  for (int s = 0; s < kSubs; ++s)
#pragma unroll
    for (int h = 0; h < 2; ++h) of_left[s][h] = twice(shifts[second][row0 + s * 16 + h * 8 + g]);
#pragma unroll
  for (int n = 0; n < kRights; ++n) of_right[n] = twice(shifts[2][col0 + n * 8 + g]);

  float c[kSubs][kRights][4] = {};
  const auto flush = [&](bool begins) {
    if (!useful) return;
#pragma unroll
    for (int s = 0; s < kSubs; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + s * 16 + h * 8 + g;
        double* const to = layer.row(kCkaHead + sides[second].first + row) + kCkaHead + sides[2].first;
        const double rest = memory.rests[second][row], rest_of_sum = memory.sums[second][row] - memory.rows * rest;
        const auto exists = [&](int col) {
          return row < sides[second].columns && col < sides[2].columns &&
                 sides[2].first + col >= sides[second].first + row;
        };
#pragma unroll
        for (int part = 0; part < kRights; part += kTogether) {
          double old[kTogether][2];
#pragma unroll
          for (int n = 0; n < kTogether; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int col = col0 + (part + n) * 8 + 2 * t + e;
              old[n][e] = exists(col) && !(begins && args.fresh) ? to[col] : 0.0;
            }
          }
#pragma unroll
          for (int n = 0; n < kTogether; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int col = col0 + (part + n) * 8 + 2 * t + e;
              float& sum = c[s][part + n][2 * h + e];
              double moved = sum;
              if (begins) moved += rest * memory.sums[2][col] + rest_of_sum * memory.rests[2][col];
              if (exists(col)) to[col] = old[n][e] + moved;
              sum = 0.f;
            }
          }
        }
      }
    }
  };

  const int slabs = static_cast<int>((args.rows + kSlab - 1) / kSlab);
  fetch_kinds(0);
#pragma unroll 1
  for (int slab = 0; slab < kStages - 1; ++slab) {
    copy(slab);
    commit_copies();
  }
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    if (slab + kStages - 1 < slabs) copy(slab + kStages - 1);
    commit_copies();
    const auto& stage = memory.stages[slab % kStages];
    if (useful) multiply_slab<T>(stage[second], stage[2], row0, col0, of_left, of_right, c);
    if (slab + 1 == slabs || (slab + 1) % kSlabsOfRun == 0) flush(slab < kSlabsOfRun);
  }
  wait_for_copies<0>();
}

}  // namespace inflection
