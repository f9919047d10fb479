// The Gram matrix of z = (1, p, q, u, v) over the rows, for linear CKA of many layers in one launch.
//
// As csrc/cpu/cka.inc, but a block is kCkaDepth consecutive rows, whether they count or not. The kernels, in order: the
// shifts of layers without rows; the norms of the rows, and which of them are long; the rows of 1, p and q of the Gram
// matrix, in float64; the products of u and v (cka_products.cuh), in float32; the products of long rows, and of all rows of
// a short block, in float64. Each number has one writer, so the result is deterministic.
//
// All kernels but the products are bound by memory: the rows are read twice, long ones once more.
#include <type_traits>

#include "cka_products.cuh"

namespace inflection {
namespace {

constexpr int kShiftThreads = 1024;    // there are few blocks
static_assert(kDepth == kCkaThreads);  // classify_rows has one thread per row

// |u|^2 of a row of a whole side, in all lanes of the warp.
template <class T>
__device__ double norm_of(const Panel& side, int64_t row, const float* shift) {
  constexpr int kCount = kVectorBytes / sizeof(T);
  double total = 0.0;
  for (int col = threadIdx.x % kWarpSize * kCount; col < side.columns; col += kWarpSize * kCount) {
    T values[kCount];
    side.read(row, col, values);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const double u = col + e < side.columns ? centred(values[e], shift[col + e]) : 0.0;
      total += u * u;
    }
  }
  return warp_sum(total);
}

// ---- the shift ----------------------------------------------------------------------------------------------------

struct ShiftMemory {
  double norms[kDepth];
  int rows[kDepth];
  int count;
};

// One block per layer and side. The mean of the first kCkaDepth rows that count, without long ones.
template <class T>
__global__ void __launch_bounds__(kShiftThreads, 1) find_shift(CkaPushArgs args, Layers layers) {
  ShiftMemory& memory = shared<ShiftMemory>();
  const int64_t number = blockIdx.x / kCkaSides, layer = layers.first + number;
  const bool left = blockIdx.x % kCkaSides == 0;
  const CkaSide& source = left ? args.x : args.y;
  const Panel side = Panel::of(source, left ? layers.x[number] : layers.y[number], 0, source.dim, 0);
  float* const shift = args.shift + layer * (args.x.dim + args.y.dim) + (left ? 0 : args.x.dim);
  if (!args.fresh && args.seen[layer * args.seen_stride] != 0.0) return;

  if (threadIdx.x < kWarpSize) {
    int found = 0;
    for (int64_t begin = 0; begin < args.rows && found < kDepth; begin += kWarpSize) {
      const int64_t row = begin + threadIdx.x;
      const bool counts = row < args.rows && row_counts(args, layer, row);
      const unsigned votes = __ballot_sync(kAllLanes, counts);
      const int at = found + __popc(votes & ((1u << threadIdx.x) - 1));
      if (counts && at < kDepth) memory.rows[at] = static_cast<int>(row);
      found += __popc(votes);
    }
    if (threadIdx.x == 0) memory.count = found < kDepth ? found : kDepth;
  }
  __syncthreads();
  const int count = memory.count;
  if (count == 0) return;
  double limit = INFINITY;  // longer rows are left out
  for (int pass = 0; pass < 2; ++pass) {
    for (int col = threadIdx.x; col < side.columns; col += kShiftThreads) {
      double sum = 0.0;
      int rows = 0;
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const double x = to_float(*side.at<T>(memory.rows[i], col));
        const bool counts = pass == 0 || !(memory.norms[i] > limit);
        sum += counts ? x : 0.0;
        rows += counts;
      }
      shift[col] = static_cast<float>(sum / rows);
    }
    if (pass > 0) return;
    __syncthreads();
    for (int i = threadIdx.x / kWarpSize; i < count; i += kShiftThreads / kWarpSize) {
      const double norm = norm_of<T>(side, memory.rows[i], shift);
      if (threadIdx.x % kWarpSize == 0) memory.norms[i] = norm;
    }
    __syncthreads();
    double total = 0.0;
    for (int i = 0; i < count; ++i) total += memory.norms[i];
    limit = cka_long(total, count);
    bool any = false;
    for (int i = 0; i < count; ++i) any = any || memory.norms[i] > limit;
    if (!any) return;
  }
}

// ---- norms and column sums ----------------------------------------------------------------------------------------

// One block per layer and kCkaDepth rows: the norms of the rows, and the RowKind of each.
template <class T>
__global__ void __launch_bounds__(kCkaThreads) classify_rows(CkaPushArgs args, Layers layers, int64_t blocks) {
  double* const partial = &shared<double>();
  const Layer layer = Layer::of(args, layers, blockIdx.x / blocks);
  const Panel x = Panel::of(args.x, layer.offsets[0], 0, args.x.dim, 0);
  const Panel y = Panel::of(args.y, layer.offsets[1], 0, args.y.dim, 0);
  const int64_t block = blockIdx.x % blocks, first = block * kDepth;
  const int64_t end = first + kDepth < args.rows ? first + kDepth : args.rows;
  for (int64_t row = first + threadIdx.x / kWarpSize; row < end; row += kCkaWarps) {
    double p = 0.0, q = 0.0;
    if (row_counts(args, layer.index, row)) {
      p = norm_of<T>(x, row, layer.shift);
      q = norm_of<T>(y, row, layer.shift + args.x.dim);
    }
    if (threadIdx.x % kWarpSize == 0) layer.norms[2 * row] = p, layer.norms[2 * row + 1] = q;
  }
  __syncthreads();
  const int64_t row = first + threadIdx.x;
  const bool counts = row < end && row_counts(args, layer.index, row);
  const double p = counts ? layer.norms[2 * row] : 0.0, q = counts ? layer.norms[2 * row + 1] : 0.0;
  const double count = block_sum<kCkaThreads>(counts ? 1.0 : 0.0, partial);
  const double all_p = block_sum<kCkaThreads>(p, partial), all_q = block_sum<kCkaThreads>(q, partial);
  const bool exact = counts && (cka_all_exact(count, args.x.dim + args.y.dim, all_p, all_q) ||
                                p > cka_long(all_p, count) || q > cka_long(all_q, count));
  if (row < end) layer.kinds[row] = !counts ? kNotCounted : exact ? kInDouble : kInFloat;
  const double of_block = block_sum<kCkaThreads>(exact ? 1.0 : 0.0, partial);
  if (threadIdx.x == 0) args.block_exact[layer.index * blocks + block] = static_cast<int32_t>(of_block);
}

__device__ __forceinline__ void add(double* to, double sum, bool begins) { *to = begins ? sum : *to + sum; }

// The corner of 1, p, q: n, S_p, S_q, S_pp, S_pq, S_qq.
__device__ void add_corner(const CkaPushArgs& args, const Layer& layer, double* partial) {
  double sums[6] = {};
  for (int64_t row = threadIdx.x; row < args.rows; row += kCkaThreads) {
    if (layer.kinds[row] == kNotCounted) continue;
    const double z[3] = {1.0, layer.norms[2 * row], layer.norms[2 * row + 1]};
    int at = 0;
    for (int i = 0; i < 3; ++i)
      for (int j = i; j < 3; ++j) sums[at++] += z[i] * z[j];
  }
  int at = 0;
  for (int i = 0; i < 3; ++i) {
    for (int j = i; j < 3; ++j) {
      const double total = block_sum<kCkaThreads>(sums[at++], partial);
      if (threadIdx.x == 0) add(&layer.row(i)[j], total, args.fresh);
    }
  }
}

// The number that 16-bit products subtract from a column with this mean and variance over `rows` rows and this `largest`
// |x - shift|: 0 or the mean.
//
// With 0, tensor cores truncate the products of the mean: 2^-29 (mean / deviation)^2 per row, all in one direction. With
// the mean, elements that differ from it by more than half of it are rounded, at random, so the error is proportional to
// 1 / sqrt(rows dim); there are few of them if the mean is above six deviations. At kBalance both errors are equal.
template <class T>
__device__ T column_shift(double mean, double variance, double rows, double dim, float largest, float shift) {
  constexpr bool kHalf = std::is_same_v<T, F16>;
  constexpr double kFar = 36.0, kBalance = kHalf ? 4e4 : 3e5, kLargestHalf = 65504.0;
  const double balance = kBalance / (rows * sqrt(rows * dim)), limit = balance < kFar ? balance : kFar;
  T out{};
  if (!(mean * mean > limit * variance)) return out;
  put(&out, static_cast<float>(mean));
  if (kHalf && !(largest + fabs(double(to_float(out)) - shift) <= kLargestHalf)) return T{};  // u would be infinite
  return out;
}

constexpr int kColumns = 64;  // columns per block of sum_columns: 128 bytes of a 16-bit row
constexpr int kColumnSums = 5;

struct ColumnMemory {
  double sums[kColumnSums][kCkaWarps][kColumns];
  float largest[kCkaWarps][kColumns];
  double partial[kCkaWarps];
};

// Rows 1, p and q of the Gram matrix; and, for the products, column sums of the rows that they multiply, and shifts.
template <class T>
__global__ void __launch_bounds__(kCkaThreads) sum_columns(CkaPushArgs args, Layers layers, int64_t panels) {
  constexpr int kCount = kVectorBytes / sizeof(T), kLanes = kColumns / kCount, kRowsOfWarp = kWarpSize / kLanes;
  constexpr int kHalves = kPanel / kColumns;
  ColumnMemory& memory = shared<ColumnMemory>();
  const Layer layer = Layer::of(args, layers, blockIdx.x / (panels * kHalves));
  const int64_t block = blockIdx.x % (panels * kHalves), number = block / kHalves;
  const Panel panel = Panel::of(args, layer, number);
  const int begin = static_cast<int>(block % kHalves) * kColumns;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, own = lane % kLanes * kCount;
  if (block == 0) add_corner(args, layer, memory.partial);

  float shift[kCount], largest[kCount] = {};
#pragma unroll
  for (int e = 0; e < kCount; ++e)
    shift[e] = begin + own + e < panel.columns ? layer.shift[panel.first + begin + own + e] : 0.f;
  double sums[kColumnSums][kCount] = {};  // of u and u^2 over rows in float, of u over rows in double, of p u, of q u
  int64_t found = 0;
  for (int64_t row = warp * kRowsOfWarp + lane / kLanes; row < args.rows; row += kCkaWarps * kRowsOfWarp) {
    const uint8_t kind = layer.kinds[row];
    if (kind == kNotCounted) continue;
    const double p = layer.norms[2 * row], q = layer.norms[2 * row + 1];
    T values[kCount];
    panel.read(row, begin + own, values);
    found += kind == kInFloat;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const double u = centred(values[e], shift[e]);
      if (kind == kInFloat) {
        sums[0][e] += u, sums[1][e] += u * u;
        largest[e] = fmaxf(largest[e], fabsf(static_cast<float>(u)));
      } else {
        sums[2][e] += u;
      }
      sums[3][e] += p * u, sums[4][e] += q * u;
    }
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
#pragma unroll
    for (int lanes = kLanes; lanes < kWarpSize; lanes *= 2) {
#pragma unroll
      for (int i = 0; i < kColumnSums; ++i) sums[i][e] += __shfl_xor_sync(kAllLanes, sums[i][e], lanes);
      largest[e] = fmaxf(largest[e], __shfl_xor_sync(kAllLanes, largest[e], lanes));
    }
    if (lane >= kLanes) continue;
#pragma unroll
    for (int i = 0; i < kColumnSums; ++i) memory.sums[i][warp][own + e] = sums[i][e];
    memory.largest[warp][own + e] = largest[e];
  }
  const double rows = block_sum<kCkaThreads>(lane % kLanes == 0 ? double(found) : 0.0, memory.partial);
  if (block == 0 && threadIdx.x == 0) args.float_rows[layer.index] = rows;
  if (threadIdx.x >= kColumns) return;

  const int column = threadIdx.x, at = begin + column;
  double total[kColumnSums] = {};
  float most = 0.f;
  for (int w = 0; w < kCkaWarps; ++w) {
    for (int i = 0; i < kColumnSums; ++i) total[i] += memory.sums[i][w][column];
    most = fmaxf(most, memory.largest[w][column]);
  }
  const bool exists = at < panel.columns;
  const int64_t j = panel.first + at;
  if (exists) {
    add(layer.row(0) + kCkaHead + j, total[0] + total[2], args.fresh);
    add(layer.row(1) + kCkaHead + j, total[3], args.fresh);
    add(layer.row(2) + kCkaHead + j, total[4], args.fresh);
    args.column_sums[layer.index * (layer.k - kCkaHead) + j] = total[0];
  }
  if constexpr (sizeof(T) == 2) {
    const float old = exists ? layer.shift[j] : 0.f;
    const double mean = total[0] / rows, variance = total[1] / rows - mean * mean;
    T* const out = reinterpret_cast<T*>(args.column_shifts) + (layer.index * panels + number) * kPanel + at;
    const double dim = static_cast<double>(j < args.x.dim ? args.x.dim : args.y.dim);
    *out = exists && rows > 0.0 ? column_shift<T>(old + mean, variance, rows, dim, most, old) : T{};
  }
}

// ---- products in float64 ------------------------------------------------------------------------------------------

constexpr int kExactStep = 16;  // rows in shared memory at a time

struct ExactMemory {
  alignas(16) double rows[2][kExactStep][kPanel];
  int32_t found[kCkaWarps];
  int32_t list[kDepth];  // rows of the block, counted from its first
};

template <class T>
__global__ void __launch_bounds__(kCkaThreads)
    add_exact_rows(CkaPushArgs args, Layers layers, int64_t panels, int64_t tiles, int64_t blocks) {
  constexpr int kCount = kVectorBytes / sizeof(T), kChunks = kPanel / kCount;
  ExactMemory& memory = shared<ExactMemory>();
  const Layer layer = Layer::of(args, layers, blockIdx.x / tiles);
  int64_t left = 0, right = 0;
  if (!Tiles<1>::at(panels, blockIdx.x % tiles, left, right)) return;
  const Panel sides[2] = {Panel::of(args, layer, left), Panel::of(args, layer, right)};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  bool any = false;
  double sums[kOwn][kOwn] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const int count = args.block_exact[layer.index * blocks + block];
    if (count == 0) continue;
    any = true;
    const int64_t first = block * kDepth, row = first + threadIdx.x;
    const bool mine = row < args.rows && layer.kinds[row] == kInDouble;
    const unsigned votes = __ballot_sync(kAllLanes, mine);
    __syncthreads();
    if (lane == 0) memory.found[warp] = __popc(votes);
    __syncthreads();
    int at = __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < warp; ++w) at += memory.found[w];
    if (mine) memory.list[at] = static_cast<int32_t>(threadIdx.x);
    __syncthreads();
    for (int begin = 0; begin < count; begin += kExactStep) {
      const int number = count - begin < kExactStep ? count - begin : kExactStep;
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        for (int i = threadIdx.x; i < number * kChunks; i += kCkaThreads) {
          const int r = i / kChunks, col = i % kChunks * kCount;
          T values[kCount];
          sides[p].read(first + memory.list[begin + r], col, values);
#pragma unroll
          for (int e = 0; e < kCount; ++e) {
            memory.rows[p][r][col + e] =
                col + e < sides[p].columns ? centred(values[e], layer.shift[sides[p].first + col + e]) : 0.0;
          }
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int r = 0; r < number; ++r) multiply_row(memory.rows[0][r], memory.rows[1][r], sums);
      __syncthreads();
    }
  }
  if (any) add_tile(layer, sides[0], sides[1], sums, false);
}

// ---- launches -----------------------------------------------------------------------------------------------------

// Calls body(go) for groups of at most kLayersOfLaunch layers; go(kernel, blocks per layer, threads, shared bytes, ...)
// launches a kernel.
template <class Body>
int launch_layers(const CkaPushArgs& args, void* stream, const Body& body) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (args.rows == 0) return cudaSuccess;
  if (args.rows > kMostBlocks) return cudaErrorInvalidValue;
  for (int64_t first = 0; first < args.layers; first += kLayersOfLaunch) {
    const int64_t count = args.layers - first < kLayersOfLaunch ? args.layers - first : kLayersOfLaunch;
    Layers layers;
    layers.first = first;
    for (int64_t i = 0; i < count; ++i)
      layers.x[i] = args.x.offsets[first + i], layers.y[i] = args.y.offsets[first + i];
    int error = cudaSuccess;
    const auto go = [&](auto* kernel, int64_t blocks, int threads, size_t bytes, auto... rest) {
      if (error != cudaSuccess || blocks * count > kMostBlocks) {
        error = error != cudaSuccess ? error : int{cudaErrorInvalidValue};
        return;
      }
      const dim3 grid(static_cast<unsigned>(blocks * count)), block(static_cast<unsigned>(threads));
      error = launch(kernel, grid, block, bytes, stream, args, layers, rest...);
    };
    body(go);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T>
int push(const CkaPushArgs& args, void* stream) {
  const int64_t panels = cka_gpu_panels(args.x.dim, args.y.dim), blocks = ceil_div(args.rows, kDepth);
  return launch_layers(args, stream, [&](const auto& go) {
    if (args.adopt) go(find_shift<T>, kCkaSides, kShiftThreads, sizeof(ShiftMemory));
    go(classify_rows<T>, blocks, kCkaThreads, sizeof(double) * kCkaWarps, blocks);
    go(sum_columns<T>, panels * (kPanel / kColumns), kCkaThreads, sizeof(ColumnMemory), panels);
    if constexpr (sizeof(T) == 2) {
      const int64_t tiles = Tiles<kLeftPanels>::count(panels);
      go(add_half_products<T>, tiles, kCkaThreads, sizeof(HalfMemory<T>), panels, tiles);
    } else {
      const int64_t tiles = Tiles<1>::count(panels);
      go(add_float_products, tiles, kCkaThreads, sizeof(FloatMemory), panels, tiles);
    }
    const int64_t tiles = Tiles<1>::count(panels);
    go(add_exact_rows<T>, tiles, kCkaThreads, sizeof(ExactMemory), panels, tiles, blocks);
  });
}

}  // namespace

int cka_push_cuda(const CkaPushArgs& args, void* stream) {
  return for_dtype(args.x.dtype, [&](auto type) { return push<decltype(type)>(args, stream); });
}

int cka_adopt_cuda(const CkaPushArgs& args, void* stream) {
  return for_dtype(args.x.dtype, [&](auto type) {
    return launch_layers(args, stream, [&](const auto& go) {
      go(find_shift<decltype(type)>, kCkaSides, kShiftThreads, sizeof(ShiftMemory));
    });
  });
}

}  // namespace inflection
