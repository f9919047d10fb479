// Rows of logits, for the statistics and for their gradient: how scores are formed, the offsets of a row, and the slices
// that a thread reads at once.
#pragma once

#include "core/score_form.h"
#include "mask.cuh"
#include "row_lanes.cuh"

namespace inflection {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kVectorBytes = 16;
constexpr int kDenseSlice = 4 * kVectorBytes;  // bytes of a slice: 4 loads in flight per thread
constexpr int kOtherSlice = kVectorBytes;      // with a mask or strides addresses cost more than latency
constexpr float kLargeLse = 16.f;              // for a larger one, rounding to float32 makes probabilities inaccurate

// How scores are formed from logits.
struct Form : LogitForm {
  bool first;               // whether the score of key 0 is needed
  Exponential exponential;  // of `scale`
};

inline Form form_of(const AttentionStatsArgs& args) {
  const LogitForm form = LogitForm::of(args);
  return {form, args.out.keys != nullptr, Exponential::of(form.scale)};
}

struct Row {
  int64_t logits, mask;  // offsets in elements
  int64_t index;         // in [batch..., rows]
  int64_t cols;          // columns that can be attended
};

__device__ __forceinline__ Row row_of(const AttentionStatsArgs& args, int64_t item) {
  const int64_t b = item / args.rows, r = args.rows - 1 - (item - b * args.rows);
  Row row{r * args.row_stride, r * args.mask.row_stride, b * args.rows + r, args.cols};
  for_indices(b, args.sizes, args.dims, [&](int32_t d, int64_t i) {
    row.logits += i * args.strides[d];
    row.mask += i * args.mask.strides[d];
  });
  if (args.causal && r + 1 < row.cols) row.cols = r + 1;
  return row;
}

// Layout of a slice of one row over threads: N values per thread, in runs of adjacent columns if vectors are read.
template <class T, bool kVector, int kBytes>
struct SliceColumns {
  static constexpr int N = kBytes / sizeof(T);
  static constexpr int kRun = kVector ? kVectorBytes / sizeof(T) : 1;  // consecutive columns of one thread

  static __device__ __forceinline__ int64_t column(int64_t begin, int i, int thread, int threads) {
    return begin + (int64_t(i / kRun) * threads + thread) * kRun + i % kRun;
  }
};

// 16-bit values as they are stored, two per word. Missing columns are -inf.
template <class T, int kBytes>
struct PairSlice : SliceColumns<T, true, kBytes> {
  using Columns = SliceColumns<T, true, kBytes>;
  static constexpr int kPairs = Columns::N / 2, kRunPairs = Columns::kRun / 2;

  uint32_t pair[kPairs];

  __device__ __forceinline__ void read(const AttentionStatsArgs& args, const Row& row, int64_t begin, int thread,
                                       int threads) {
    const T* logits = static_cast<const T*>(args.logits) + row.logits;
    if (begin + int64_t{Columns::N} * threads <= row.cols) {
#pragma unroll
      for (int i = 0; i < kPairs; i += kRunPairs) load(i, logits + Columns::column(begin, 2 * i, thread, threads));
      return;
    }
#pragma unroll
    for (int i = 0; i < kPairs; i += kRunPairs) {
      const int64_t col = Columns::column(begin, 2 * i, thread, threads);
      if (col + Columns::kRun <= row.cols) {
        load(i, logits + col);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kRunPairs; ++j) {
        const int64_t at = col + 2 * j;
        uint32_t& both = pair[i + j] = Infinity<T>::kMinusPair;
        if (at < row.cols) both = (both & 0xffff0000u) | logits[at].bits;
        if (at + 1 < row.cols) both = (both & 0xffffu) | uint32_t{logits[at + 1].bits} << 16;
      }
    }
  }

  // Number of values above `floor`; none may be NaN.
  __device__ __forceinline__ int above(float floor) const {
    uint32_t lowest = pair[0];
#pragma unroll
    for (int i = 1; i < kPairs; ++i) lowest = smaller<T>(lowest, pair[i]);
    if (fminf(front<T>(lowest), back<T>(lowest)) > floor) return 2 * kPairs;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) count += (front<T>(pair[i]) > floor) + (back<T>(pair[i]) > floor);
    return count;
  }

 private:
  __device__ __forceinline__ void load(int i, const T* from) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(pair + i, &raw, kVectorBytes);
  }
};

// Whether slices are read as pairs of 16-bit values.
template <class T, bool kVector, bool kMask>
constexpr bool kInPairs = kVector && !kMask && sizeof(T) == 2;

// The values of a slice. +inf becomes NaN, masked and missing columns -inf.
template <class T, bool kVector, bool kMask, int kBytes>
struct Slice : SliceColumns<T, kVector, kBytes> {
  using Columns = SliceColumns<T, kVector, kBytes>;
  using Columns::N, Columns::kRun;

  float value[N];
  float low[N];

  __device__ __forceinline__ void read(const AttentionStatsArgs& args, const Form& form, const Row& row, int64_t begin,
                                       int thread, int threads) {
    const T* logits = static_cast<const T*>(args.logits) + row.logits;
#pragma unroll
    for (int i = 0; i < N; i += kRun) {
      const int64_t col = Columns::column(begin, i, thread, threads);
      if (kVector && col + kRun <= row.cols) {
        const uint4 raw = *reinterpret_cast<const uint4*>(logits + col);
        T run[kRun];
        memcpy(run, &raw, kVectorBytes);
#pragma unroll
        for (int j = 0; j < kRun; ++j) value[i + j] = to_float(run[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kRun; ++j)
          value[i + j] = col + j < row.cols ? to_float(logits[(col + j) * args.col_stride]) : -kInf;
      }
    }
    form_scores(args, form, row, begin, thread, threads);
  }
  __device__ __forceinline__ void take(const PairSlice<T, kBytes>& from, const AttentionStatsArgs& args,
                                       const Form& form) {
    static_assert(kInPairs<T, kVector, kMask>);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) value[2 * i] = front<T>(from.pair[i]), value[2 * i + 1] = back<T>(from.pair[i]);
    form_scores(args, form, Row{}, 0, 0, 0);
  }

 private:
  __device__ __forceinline__ void form_scores(const AttentionStatsArgs& args, const Form& form, const Row& row,
                                              int64_t begin, int thread, int threads) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float v = value[i];
      bool masked = v <= args.floor;  // so is a column beyond the end of the row
      value[i] = v < kInf ? __fmul_rn(v, form.factor) : NAN;
      low[i] = 0.f;
      if (kMask && !masked) {
        float bias;
        masked =
            !attends(args.mask, row.mask + Columns::column(begin, i, thread, threads) * args.mask.col_stride, bias);
        if (!masked && form.low) {
          const float product = value[i];
          add_bias(v, product, fmaf(v, form.factor, -product), form.factor_low, bias, value[i], low[i]);
          if (!(v < kInf)) value[i] = NAN;
        }
      }
      if (masked) value[i] = -kInf;
    }
  }
};

// State of the columns [begin, row.cols) that the calling threads read, merged over each warp.
template <class T, bool kVector, bool kMask, int kBytes>
__device__ __forceinline__ MergedRow total_of(const AttentionStatsArgs& args, const Form& form, const Row& row,
                                              int64_t begin, int thread, int threads, int& keys) {
  using Part = Slice<T, kVector, kMask, kBytes>;
  RowLane lane;
  for (; begin < row.cols; begin += int64_t{Part::N} * threads) {
    Part part;
    if constexpr (kInPairs<T, kVector, kMask>) {
      PairSlice<T, kBytes> pairs;
      pairs.read(args, row, begin, thread, threads);
      if (form.factor == 1.f && lane.template push_pairs<T>(pairs.pair, args.floor, form.exponential)) {
        if (form.first) keys += pairs.above(args.floor);
        continue;
      }
      part.take(pairs, args, form);
    } else {
      part.read(args, form, row, begin, thread, threads);
    }
    if (form.first) {
#pragma unroll
      for (int i = 0; i < Part::N; ++i) keys += part.value[i] != -kInf;
    }
    if (kMask && form.low) lane.template push<Part::N, kMask>(part.value, part.low, form.exponential);
    else lane.template push<Part::N, false>(part.value, part.low, form.exponential);
  }
  return merge_warp(MergedRow::of(lane), form.exponential);
}

// Splits a row into `count` pieces of `cols` columns; the last ones may be shorter or empty.
struct Cuts {
  int64_t count, cols;

  static Cuts of(int64_t count, int64_t all) {
    constexpr int64_t kAlign = kLeastSlice;  // aligned to the vectors of a warp
    return {count, ceil_div(ceil_div(all, count), kAlign) * kAlign};
  }
};

// Whether a float32 log-sum-exp is too inaccurate for probabilities.
__device__ __forceinline__ bool is_large(float lse) { return lse - lse == 0.f && fabsf(lse) > kLargeLse; }

inline bool vectors_fit(const AttentionStatsArgs& args, size_t size) {
  const auto whole = [size](int64_t stride) { return stride * static_cast<int64_t>(size) % kVectorBytes == 0; };
  bool fits =
      args.col_stride == 1 && reinterpret_cast<uintptr_t>(args.logits) % kVectorBytes == 0 && whole(args.row_stride);
  for (int32_t d = 0; d < args.dims; ++d) fits = fits && whole(args.strides[d]);
  return fits;
}

inline dim3 grid_of_warps(int64_t items) { return dim3(static_cast<unsigned>(ceil_div(items, kWarps))); }

// Writes the states of the parts of rows with a large log-sum-exp to args.parts.
int stats_of_large_rows_cuda(const AttentionStatsArgs& args, const float* lse, void* stream);

}  // namespace inflection
