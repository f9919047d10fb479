// The sums behind linear CKA: the Gram matrix of z = (1, p, q, u, v) over the rows, for many layers in one launch.
//
// As csrc/cpu/cka.inc, with blocks of kCkaDepth rows as they lie, counted or not. Three kernels: the shift of layers
// that have none yet; the norms of the rows, and which of them are long; the products. A block of the last one owns a
// 64 x 64 tile on or above the diagonal: it subtracts the shift while it fills shared memory, multiplies in float32,
// adds every kCkaDepth rows to float64 sums in registers and reads and writes the Gram matrix once. Long rows, and all
// of a block of few, are multiplied in float64. Every number has one writer: the result is the same in every run.
//
// Bound by fused multiply-adds in float32 (67 TFLOP/s on an H100) and, at 4 x 4 results a thread, by the shared memory
// that feeds them: 16-bit inputs do not use tensor cores here, so the goal of 60 % of their rate is out of reach.
#include "kernels.h"
#include "warp.cuh"

namespace inflection {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTile = 64;  // rows and columns of the Gram matrix that a block owns
constexpr int kOwn = 4;    // of them a thread owns 4 x 4
constexpr int kAcross = kTile / kOwn;
static_assert(kAcross * kAcross == kThreads);
constexpr int kStep = 16;             // rows in shared memory at a time: 8 KiB, loads of 8 values a thread in flight
constexpr int kPitch = kTile + 4;     // floats between rows of shared memory: 16-byte loads stay aligned
constexpr int kLayersOfLaunch = 128;  // their offsets travel as a kernel parameter
constexpr double kLong = 8.0;  // as in csrc/cpu/cka.inc: a row is long beyond so many times the mean of its block
constexpr int kDepth = static_cast<int>(kCkaDepth);
static_assert(kDepth == kThreads);  // a thread a row, where rows are judged

enum RowKind : uint8_t { kNotCounted, kInFloat, kInDouble };

struct Layers {
  int64_t x[kLayersOfLaunch], y[kLayersOfLaunch];  // offsets in elements
  int64_t first;                                   // number of the first one
};

__device__ __forceinline__ float value_at(const CkaSide& side, int64_t offset) {
  if (side.dtype == DType::f32) return static_cast<const float*>(side.data)[offset];
  if (side.dtype == DType::bf16) return to_float(static_cast<const BF16*>(side.data)[offset]);
  return to_float(static_cast<const F16*>(side.data)[offset]);
}

__device__ __forceinline__ bool row_counts(const CkaPushArgs& args, int64_t layer, int64_t row) {
  return args.mask == nullptr || args.mask[layer * args.mask_layer_stride + row * args.mask_row_stride];
}

// One layer of the launch.
struct Layer {
  int64_t index, x, y, k;
  float* shift;
  double* gram;
  double* norms;
  uint8_t* kinds;

  static __device__ __forceinline__ Layer of(const CkaPushArgs& args, const Layers& layers, int64_t number) {
    const int64_t index = layers.first + number, dims = args.x.dim + args.y.dim, k = kCkaHead + dims;
    double* const gram = args.gram + index * cka_packed_size(k);
    double* const norms = args.row_norms + index * args.rows * 2;
    uint8_t* const kinds = args.row_kinds + index * args.rows;
    return {index, layers.x[number], layers.y[number], k, args.shift + index * dims, gram, norms, kinds};
  }
  static __device__ __forceinline__ int64_t cka_packed_size(int64_t k) { return k * (k + 1) / 2; }
  __device__ __forceinline__ double& at(int64_t i, int64_t j) const { return gram[i * k - i * (i - 1) / 2 + j - i]; }
};

// |x - shift|^2 of a row, in every lane of the warp that asks.
__device__ double norm_of(const CkaSide& side, int64_t row, const float* shift) {
  double total = 0.0;
  for (int64_t j = threadIdx.x % kWarpSize; j < side.dim; j += kWarpSize) {
    const double u = value_at(side, row + j * side.col_stride) - shift[j];
    total += u * u;
  }
  return warp_sum(total);
}

struct ShiftMemory {
  double norms[kDepth];
  int rows[kDepth];
  int count;
};

// A block per layer and side. The mean of the first kCkaDepth rows that count, without those that are long.
__global__ void __launch_bounds__(kThreads) find_shift(CkaPushArgs args, Layers layers) {
  ShiftMemory& memory = shared<ShiftMemory>();
  const int64_t number = blockIdx.x / kCkaSides, layer = layers.first + number;
  const bool left = blockIdx.x % kCkaSides == 0;
  const CkaSide& side = left ? args.x : args.y;
  const int64_t offset = left ? layers.x[number] : layers.y[number];
  float* const shift = args.shift + layer * (args.x.dim + args.y.dim) + (left ? 0 : args.x.dim);
  if (args.seen[layer * args.seen_stride] != 0.0) return;

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
  const auto row_at = [&](int i) { return offset + memory.rows[i] * side.row_stride; };
  double limit = INFINITY;  // rows beyond it are left out
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t j = threadIdx.x; j < side.dim; j += kThreads) {
      double sum = 0.0;
      int rows = 0;
      for (int i = 0; i < count; ++i) {
        if (pass > 0 && memory.norms[i] > limit) continue;
        sum += value_at(side, row_at(i) + j * side.col_stride);
        ++rows;
      }
      shift[j] = static_cast<float>(sum / rows);
    }
    if (pass > 0) return;
    __syncthreads();
    for (int i = threadIdx.x / kWarpSize; i < count; i += kWarps) {
      const double norm = norm_of(side, row_at(i), shift);
      if (threadIdx.x % kWarpSize == 0) memory.norms[i] = norm;
    }
    __syncthreads();
    double total = 0.0;
    for (int i = 0; i < count; ++i) total += memory.norms[i];
    limit = kLong * total / count;
    bool any = false;
    for (int i = 0; i < count; ++i) any = any || memory.norms[i] > limit;
    if (!any) return;
  }
}

// A block per layer and kCkaDepth rows: the norms of the rows, and how each of them is to be multiplied.
__global__ void __launch_bounds__(kThreads) judge_rows(CkaPushArgs args, Layers layers, int64_t blocks) {
  double* const partial = &shared<double>();
  const Layer layer = Layer::of(args, layers, blockIdx.x / blocks);
  const int64_t first = blockIdx.x % blocks * kDepth, end = first + kDepth < args.rows ? first + kDepth : args.rows;
  for (int64_t row = first + threadIdx.x / kWarpSize; row < end; row += kWarps) {
    double p = 0.0, q = 0.0;
    if (row_counts(args, layer.index, row)) {
      p = norm_of(args.x, layer.x + row * args.x.row_stride, layer.shift);
      q = norm_of(args.y, layer.y + row * args.y.row_stride, layer.shift + args.x.dim);
    }
    if (threadIdx.x % kWarpSize == 0) layer.norms[2 * row] = p, layer.norms[2 * row + 1] = q;
  }
  __syncthreads();
  const int64_t row = first + threadIdx.x;
  const bool counts = row < end && row_counts(args, layer.index, row);
  const double p = counts ? layer.norms[2 * row] : 0.0, q = counts ? layer.norms[2 * row + 1] : 0.0;
  const double count = block_sum<kThreads>(counts ? 1.0 : 0.0, partial);
  const double all_p = block_sum<kThreads>(p, partial), all_q = block_sum<kThreads>(q, partial);
  const bool exact = count <= double(kCkaExactRows) || p > kLong * all_p / count || q > kLong * all_q / count;
  if (row < end) layer.kinds[row] = !counts ? kNotCounted : exact ? kInDouble : kInFloat;
}

// Element i of z of a row.
__device__ __forceinline__ float element(const CkaPushArgs& args, const Layer& layer, int64_t row, int64_t i) {
  if (i >= layer.k) return 0.f;
  if (i == 0) return 1.f;
  if (i < kCkaHead) return static_cast<float>(layer.norms[2 * row + i - 1]);
  const int64_t j = i - kCkaHead;
  if (j < args.x.dim)
    return value_at(args.x, layer.x + row * args.x.row_stride + j * args.x.col_stride) - layer.shift[j];
  const int64_t y = layer.y + row * args.y.row_stride + (j - args.x.dim) * args.y.col_stride;
  return value_at(args.y, y) - layer.shift[j];
}
__device__ __forceinline__ double exact_element(const CkaPushArgs& args, const Layer& layer, int64_t row, int64_t i) {
  return i == 1 || i == 2 ? layer.norms[2 * row + i - 1] : double(element(args, layer, row, i));
}

struct ProductMemory {
  alignas(16) float left[kStep][kPitch];
  alignas(16) float right[kStep][kPitch];
  double partial[kWarps];
  uint8_t kinds[kDepth];
};

// The corner of 1, p, q, in float64: n, S_p, S_q, S_pp, S_pq, S_qq.
__device__ void add_corner(const CkaPushArgs& args, const Layer& layer, double* partial) {
  double sums[6] = {};
  for (int64_t row = threadIdx.x; row < args.rows; row += kThreads) {
    if (layer.kinds[row] == kNotCounted) continue;
    const double z[3] = {1.0, layer.norms[2 * row], layer.norms[2 * row + 1]};
    int at = 0;
    for (int i = 0; i < 3; ++i)
      for (int j = i; j < 3; ++j) sums[at++] += z[i] * z[j];
  }
  int at = 0;
  for (int i = 0; i < 3; ++i) {
    for (int j = i; j < 3; ++j) {
      const double total = block_sum<kThreads>(sums[at++], partial);
      if (threadIdx.x == 0) layer.at(i, j) += total;
    }
  }
}

__global__ void __launch_bounds__(kThreads) add_products(CkaPushArgs args, Layers layers, int64_t tiles) {
  ProductMemory& memory = shared<ProductMemory>();
  const Layer layer = Layer::of(args, layers, blockIdx.x / tiles);
  int64_t across = (layer.k + kTile - 1) / kTile, tile = blockIdx.x % tiles, tile_row = 0;
  for (; tile >= across - tile_row; ++tile_row) tile -= across - tile_row;  // tiles of the upper triangle, row by row
  const int64_t row0 = tile_row * kTile, col0 = (tile_row + tile) * kTile;
  const int own_row = threadIdx.x / kAcross * kOwn, own_col = threadIdx.x % kAcross * kOwn;
  if (row0 == 0 && col0 == 0) add_corner(args, layer, memory.partial);

  double sums[kOwn][kOwn] = {};
  for (int64_t first = 0; first < args.rows; first += kDepth) {
    const int count = static_cast<int>(args.rows - first < kDepth ? args.rows - first : kDepth);
    __syncthreads();
    const uint8_t kind =
        static_cast<int>(threadIdx.x) < count ? layer.kinds[first + threadIdx.x] : uint8_t{kNotCounted};
    memory.kinds[threadIdx.x] = kind;
    const bool any_float = __syncthreads_or(kind == kInFloat), any_double = __syncthreads_or(kind == kInDouble);
    float part[kOwn][kOwn] = {};
    for (int begin = 0; any_float && begin < count; begin += kStep) {
      __syncthreads();
      for (int i = threadIdx.x; i < kStep * kTile; i += kThreads) {
        const int r = i / kTile, c = i % kTile;
        const bool counts = begin + r < count && memory.kinds[begin + r] == kInFloat;
        memory.left[r][c] = counts ? element(args, layer, first + begin + r, row0 + c) : 0.f;
        memory.right[r][c] = counts ? element(args, layer, first + begin + r, col0 + c) : 0.f;
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kStep; ++r) {
        const float4 a = *reinterpret_cast<const float4*>(&memory.left[r][own_row]);
        const float4 b = *reinterpret_cast<const float4*>(&memory.right[r][own_col]);
        const float left[kOwn] = {a.x, a.y, a.z, a.w}, right[kOwn] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
#pragma unroll
          for (int j = 0; j < kOwn; ++j) part[i][j] = fmaf(left[i], right[j], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kOwn; ++j) sums[i][j] += part[i][j];
    for (int r = 0; any_double && r < count; ++r) {
      if (memory.kinds[r] != kInDouble) continue;
      double left[kOwn], right[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        left[i] = exact_element(args, layer, first + r, row0 + own_row + i);
        right[i] = exact_element(args, layer, first + r, col0 + own_col + i);
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sums[i][j] = fma(left[i], right[j], sums[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t row = row0 + own_row + i, col = col0 + own_col + j;
      if (col >= row && col >= kCkaHead && col < layer.k) layer.at(row, col) += sums[i][j];
    }
  }
}

// ---- terms
// ------------------------------------------------------------------------------------------------------------

// A block per item: kCkaTermRows rows of the Gram matrix. partial: squares of S_xy, S_xx, S_yy; then s_x M_xy s_y,
// s_x M_xx s_x, s_y M_yy s_y.
__global__ void __launch_bounds__(kThreads) sum_terms(CkaTermsArgs args, int64_t items) {
  double* const memory = &shared<double>();
  const int64_t dims = args.dim_x + args.dim_y, k = kCkaHead + dims, item = blockIdx.x;
  const double* gram = args.gram + item / items * (k * (k + 1) / 2);
  const double n = gram[0];
  const double* s = gram + kCkaHead;  // [dims]: the row of 1 holds s_u, s_v
  const int64_t first = item % items * kCkaTermRows, last = first + kCkaTermRows < dims ? first + kCkaTermRows : dims;
  double sums[kCkaTermSums] = {};
  for (int64_t a = first; a < last; ++a) {
    const int64_t i = a + kCkaHead;
    const double* m = gram + i * k - i * (i - 1) / 2 - a;  // m[b] is element (a, b) of the moments
    const bool left = a < args.dim_x;
    for (int64_t b = a + threadIdx.x; b < dims; b += kThreads) {
      const bool cross = left && b >= args.dim_x;
      const double centred = m[b] - s[a] * s[b] / n, twice = cross || b == a ? 1.0 : 2.0;
      const double square = twice * centred * centred, product = twice * s[a] * m[b] * s[b];
      if (cross) sums[0] += square, sums[3] += product;
      else if (left) sums[1] += square, sums[4] += product;
      else sums[2] += square, sums[5] += product;
    }
  }
#pragma unroll
  for (int i = 0; i < kCkaTermSums; ++i) {
    const double total = block_sum<kThreads>(sums[i], memory);
    if (threadIdx.x == 0) args.partial[item * kCkaTermSums + i] = total;
  }
}

// A block per layer; see cka_terms_merge in csrc/cpu/cka.inc.
__global__ void __launch_bounds__(kThreads) merge_terms(CkaTermsArgs args, int64_t items) {
  constexpr double kNoise = 1e-12;  // rounding of the products, squared, as a share of the moments of the mean
  double* const memory = &shared<double>();
  const int64_t dims = args.dim_x + args.dim_y, k = kCkaHead + dims, layer = blockIdx.x;
  const double* gram = args.gram + layer * (k * (k + 1) / 2);
  const double n = gram[0], *s = gram + kCkaHead;
  double sums[kCkaTermSums], mean[2] = {}, of_p[2] = {}, of_q[2] = {};  // |d|^2, d . w_p, d . w_q by side
#pragma unroll
  for (int i = 0; i < kCkaTermSums; ++i) {
    double total = 0.0;
    for (int64_t item = threadIdx.x; item < items; item += kThreads)
      total += args.partial[(layer * items + item) * kCkaTermSums + i];
    sums[i] = block_sum<kThreads>(total, memory);
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    double own_mean = 0.0, own_p = 0.0, own_q = 0.0;
    for (int64_t j = (side ? args.dim_x : 0) + threadIdx.x; j < (side ? dims : args.dim_x); j += kThreads) {
      const double d = s[j] / n;
      own_mean += d * d;
      own_p += d * gram[k + 2 + j];
      own_q += d * gram[2 * k + j];
    }
    mean[side] = block_sum<kThreads>(own_mean, memory);
    of_p[side] = block_sum<kThreads>(own_p, memory);
    of_q[side] = block_sum<kThreads>(own_q, memory);
  }
  if (threadIdx.x != 0) return;
  const double norm[2] = {gram[1], gram[2]};
  const auto term = [&](int t, int i, int j, double square, double dots) {
    double out = sums[t];
    if (args.debiased) {
      const double kl = square - 2.0 * dots + 4.0 * sums[3 + t] / (n * n) + mean[j] * norm[i] + mean[i] * norm[j] -
                        3.0 * n * mean[i] * mean[j];
      const double total = (norm[i] - n * mean[i]) * (norm[j] - n * mean[j]);
      out = n < 4.0 ? NAN : sums[t] - n / (n - 2.0) * kl + total / ((n - 1.0) * (n - 2.0));
    }
    if (t > 0 && out <= kNoise * (n * mean[i]) * (n * mean[i])) out = 0.0;
    args.terms[layer * 3 + t] = out;
  };
  term(0, 0, 1, gram[k + 1], of_p[1] + of_q[0]);
  term(1, 0, 0, gram[k], 2.0 * of_p[0]);
  term(2, 1, 1, gram[2 * k - 1], 2.0 * of_q[1]);
}

constexpr size_t kSumsMemory = sizeof(double) * kWarps;

// Calls body(go, layers) for as many layers as a launch holds; go(kernel, blocks, shared bytes, more...) launches for them.
template <class Body>
int launch_layers(const CkaPushArgs& args, void* stream, const Body& body) {
  if (args.rows == 0) return cudaSuccess;
  if (args.rows > 0x7fffffff) return cudaErrorInvalidValue;
  for (int64_t first = 0; first < args.layers; first += kLayersOfLaunch) {
    const int64_t count = args.layers - first < kLayersOfLaunch ? args.layers - first : kLayersOfLaunch;
    Layers layers;
    layers.first = first;
    for (int64_t i = 0; i < count; ++i)
      layers.x[i] = args.x.offsets[first + i], layers.y[i] = args.y.offsets[first + i];
    const auto go = [&](auto* kernel, int64_t grid, size_t bytes, auto... rest) {
      return launch(kernel, dim3(static_cast<unsigned>(grid)), dim3(kThreads), bytes, stream, args, layers, rest...);
    };
    const int error = body(go, count);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int cka_push_cuda(const CkaPushArgs& args, void* stream) {
  const int64_t across = ceil_div(kCkaHead + args.x.dim + args.y.dim, kTile), tiles = across * (across + 1) / 2;
  const int64_t blocks = ceil_div(args.rows, kDepth);
  if (tiles * kLayersOfLaunch > 0x7fffffff) return cudaErrorInvalidValue;
  return launch_layers(args, stream, [&](const auto& go, int64_t count) {
    int error = args.adopt ? go(find_shift, count * kCkaSides, sizeof(ShiftMemory)) : cudaSuccess;
    if (error == cudaSuccess) error = go(judge_rows, count * blocks, kSumsMemory, blocks);
    if (error == cudaSuccess) error = go(add_products, count * tiles, sizeof(ProductMemory), tiles);
    return error;
  });
}

int cka_adopt_cuda(const CkaPushArgs& args, void* stream) {
  return launch_layers(args, stream, [&](const auto& go, int64_t count) {
    return go(find_shift, count * kCkaSides, sizeof(ShiftMemory));
  });
}

int cka_terms_cuda(const CkaTermsArgs& args, void* stream) {
  const int64_t items = cka_term_items(args.dim_x, args.dim_y), blocks = args.layers * items;
  if (blocks == 0) return cudaSuccess;
  return launch(sum_terms, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kSumsMemory, stream, args, items);
}

int cka_terms_merge_cuda(const CkaTermsArgs& args, void* stream) {
  const int64_t items = cka_term_items(args.dim_x, args.dim_y);
  const dim3 grid(static_cast<unsigned>(args.layers));
  if (args.layers == 0) return cudaSuccess;
  return launch(merge_terms, grid, dim3(kThreads), kSumsMemory, stream, args, items);
}

}  // namespace inflection
