// Shared by the kernels of linear CKA: the rows and sums of a layer, and its panels of columns.
#pragma once

#include "core/cka.h"
#include "warp.cuh"

namespace inflection {

constexpr int kCkaThreads = 256;
constexpr int kCkaWarps = kCkaThreads / kWarpSize;
constexpr int kDepth = static_cast<int>(kCkaDepth);
constexpr int kPanel = static_cast<int>(kCkaGpuPanel);
constexpr int kLayersOfLaunch = 128;  // their offsets are a kernel parameter
constexpr int kVectorBytes = 16;

// Rows that do not count are not read. Long rows, and all rows of a short block, are multiplied in float64.
enum RowKind : uint8_t { kNotCounted, kInFloat, kInDouble };

struct Layers {
  int64_t x[kLayersOfLaunch], y[kLayersOfLaunch];  // offsets in elements
  int64_t first;                                   // number of the first one
};

__device__ __forceinline__ bool row_counts(const CkaPushArgs& args, int64_t layer, int64_t row) {
  return args.mask == nullptr || args.mask[layer * args.mask_layer_stride + row * args.mask_row_stride];
}

// An element less its shift, as it enters the products: rounded to float32, but exact for 16-bit elements.
__device__ __forceinline__ double centred(float x, float shift) { return x - shift; }
__device__ __forceinline__ double centred(BF16 x, float shift) { return double(to_float(x)) - double(shift); }
__device__ __forceinline__ double centred(F16 x, float shift) { return double(to_float(x)) - double(shift); }

// One layer of the launch.
struct Layer {
  int64_t index, k;
  int64_t offsets[2];  // of the first row of x, of y
  double* gram;        // [cka_packed(k)]
  float* shift;        // [Dx + Dy]
  double* norms;       // [rows, 2]
  uint8_t* kinds;      // [rows]

  static __device__ __forceinline__ Layer of(const CkaPushArgs& args, const Layers& layers, int64_t number) {
    const int64_t index = layers.first + number, dims = args.x.dim + args.y.dim, k = kCkaHead + dims;
    double* const gram = args.gram + index * cka_packed(k);
    return {index,
            k,
            {layers.x[number], layers.y[number]},
            gram,
            args.shift + index * dims,
            args.row_norms + index * args.rows * 2,
            args.row_kinds + index * args.rows};
  }
  // Row i of the Gram matrix, indexed by the column j >= i.
  __device__ __forceinline__ double* row(int64_t i) const { return gram + cka_row(k, i); }
};

// Up to kPanel columns of one side.
struct Panel {
  const void* data;  // row 0, first column of the panel
  int64_t row_stride, col_stride;
  int64_t first;  // number of its first column among those of u and v
  int columns;    // number of columns; 0 if there is no such panel
  bool vector;    // rows can be read 16 bytes at a time

  // Columns [begin, begin + count) of a side, or up to its last one; its row 0 begins `offset` elements behind its data.
  static __device__ __forceinline__ Panel of(const CkaSide& side, int64_t offset, int64_t begin, int64_t count,
                                             int64_t first) {
    const int64_t size = side.dtype == DType::f32 ? sizeof(float) : sizeof(uint16_t), rest = side.dim - begin;
    const char* const data = static_cast<const char*>(side.data) + (offset + begin * side.col_stride) * size;
    const bool vector = side.col_stride == 1 && side.row_stride * size % kVectorBytes == 0 &&
                        reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
    return {data, side.row_stride, side.col_stride, first, static_cast<int>(rest < count ? rest : count), vector};
  }
  static __device__ __forceinline__ Panel of(const CkaPushArgs& args, const Layer& layer, int64_t number) {
    const int64_t of_x = (args.x.dim + kPanel - 1) / kPanel, begin = (number < of_x ? number : number - of_x) * kPanel;
    return number < of_x ? of(args.x, layer.offsets[0], begin, kPanel, begin)
                         : of(args.y, layer.offsets[1], begin, kPanel, args.x.dim + begin);
  }
  template <class T>
  __device__ __forceinline__ const T* at(int64_t row, int col) const {
    return static_cast<const T*>(data) + row * row_stride + col * col_stride;
  }
  // Reads kCount elements of a row from `col`, a multiple of kCount; zeros behind the last column.
  template <int kCount, class T>
  __device__ __forceinline__ void read(int64_t row, int col, T (&out)[kCount]) const {
    static_assert(kCount * sizeof(T) == kVectorBytes);
    const T* const from = at<T>(row, col);
    if (vector && col + kCount <= columns) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from);
      memcpy(out, &raw, sizeof raw);
      return;
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) out[e] = col + e < columns ? from[e * col_stride] : T{};
  }
};

// The tiles on or above the diagonal, kLeft panels by one, in the order of kBand tile rows at a time and column after
// column, so that tiles that run at the same time share panels in the L2 cache.
template <int kLeft>
struct Tiles {
  static constexpr int64_t kBand = 4;

  // Number of blocks for a layer; some of them have no tile.
  static int64_t count(int64_t panels) {
    int64_t total = 0;
    for (int64_t band = 0; band * kLeft < panels; band += kBand) total += kBand * (panels - band * kLeft);
    return total;
  }
  // The first left panel and the right panel of block `number`; returns false if it has no tile.
  static __device__ __forceinline__ bool at(int64_t panels, int64_t number, int64_t& left, int64_t& right) {
    for (int64_t band = 0; band * kLeft < panels; band += kBand) {
      const int64_t across = panels - band * kLeft;
      if (number < kBand * across) {
        left = (band + number % kBand) * kLeft, right = band * kLeft + number / kBand;
        return left < panels && right >= left;
      }
      number -= kBand * across;
    }
    return false;
  }
};

}  // namespace inflection
