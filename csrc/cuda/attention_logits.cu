// Statistics of softmax rows from logits, and their gradient.
//
// A row belongs to one warp, or to a whole block where rows are few and long, or to many blocks, whose states a second
// kernel merges in a fixed order, where they would not fill the device. Every thread keeps a state of its own
// over 16-byte slices that it holds in registers: the slice's maximum first, then the exponentials, so the running sums
// are rebased once per slice; states are merged once per row. Rows of a causal mask are read up to the diagonal only,
// the longest first. Each logit is read once: bound by memory for float32 (27 instructions an element, against the 39
// that an H100 can issue while four bytes arrive), by issue slots for 16-bit logits (25, against 20): docs/kernels.md.
// Backward: one read of the logits, one write of the gradient, a warp per row or slice of a row; bound by memory.
//
// Odd rows and masked columns are as in csrc/cpu/attention_logits.inc.
#include "row_lanes.cuh"

namespace inflection {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int kDenseSlice = 4 * kVectorBytes;  // what a thread holds at once: 4 loads are in flight per thread
constexpr int kOtherSlice = kVectorBytes;      // with a mask or strides the addresses cost more than the latency
template <bool kVector, bool kMask>
constexpr int kSlice = kVector && !kMask ? kDenseSlice : kOtherSlice;
// Blocks that share the registers of a multiprocessor: left to itself, or with one more, nvcc spills for sm_100.
constexpr int kResident = 2;
template <bool kMask>
constexpr int kResidentBackward = kMask ? 1 : 2;
constexpr int64_t kLongRow = 1024;      // columns from which a block pays for a row,
constexpr int64_t kFewRows = 132 * 64;  // when there are fewer rows than warps on a large device
constexpr double kSmallestScale = 1e-28, kLargestScale = 1e28;  // as in csrc/cpu/attention_scores.inc
constexpr float kLargeLse = 16.f;  // beyond, the rounding of a float log-sum-exp shows in every probability

// How scores are formed from logits; see Scores in csrc/cpu/attention_scores.inc.
struct Form {
  float factor, factor_low;  // values are multiplied by their sum: 1 or -1, or the whole scale under an additive mask
  double scale;              // what remains to be multiplied by, > 0
  bool low;                  // an additive mask: scores are value + low, two floats
  bool first;                // the score of key 0 is wanted
  Exponential exponential;   // of `scale`
};

Form form_of(const AttentionStatsArgs& args) {
  Form form;
  const double magnitude = args.scale < 0.0 ? -args.scale : args.scale;
  form.low = args.mask.data != nullptr && args.mask.dtype != DType::boolean;
  const bool keep = !form.low && magnitude >= kSmallestScale && magnitude <= kLargestScale;
  const double factor = keep ? (args.scale < 0.0 ? -1.0 : 1.0) : args.scale;
  form.factor = static_cast<float>(factor), form.factor_low = static_cast<float>(factor - form.factor);
  form.scale = keep ? magnitude : 1.0;
  form.first = args.out.keys != nullptr;
  form.exponential = Exponential::of(form.scale);
  return form;
}

struct Row {
  int64_t logits, mask;  // offsets in elements
  int64_t index;         // in [batch..., rows]
  int64_t cols;          // columns that can be attended
};

__device__ Row row_of(const AttentionStatsArgs& args, int64_t item) {
  const int64_t b = item / args.rows, r = args.rows - 1 - (item - b * args.rows);
  Row row{r * args.row_stride, r * args.mask.row_stride, b * args.rows + r, args.cols};
  int64_t rest = b;
  for (int32_t d = args.dims - 1; d >= 0; --d) {
    const int64_t i = rest % args.sizes[d];
    rest /= args.sizes[d];
    row.logits += i * args.strides[d];
    row.mask += i * args.mask.strides[d];
  }
  if (args.causal && r + 1 < row.cols) row.cols = r + 1;
  return row;
}

__device__ __forceinline__ float mask_value(const Mask& mask, int64_t offset) {
  if (mask.dtype == DType::f32) return static_cast<const float*>(mask.data)[offset];
  if (mask.dtype == DType::bf16) return to_float(static_cast<const BF16*>(mask.data)[offset]);
  return to_float(static_cast<const F16*>(mask.data)[offset]);
}

// A slice of one row: N values that one thread holds. +inf becomes NaN, masked and missing columns -inf.
template <class T, bool kVector, bool kMask, int kBytes>
struct Slice {
  static constexpr int N = kBytes / sizeof(T);
  static constexpr int kRun = kVector ? kVectorBytes / sizeof(T) : 1;  // consecutive columns of one thread

  float value[N];
  float low[N];

  static __device__ __forceinline__ int64_t column(int64_t begin, int i, int thread, int threads) {
    return begin + (int64_t(i / kRun) * threads + thread) * kRun + i % kRun;
  }

  __device__ __forceinline__ void read(const AttentionStatsArgs& args, const Form& form, const Row& row, int64_t begin,
                                       int thread, int threads) {
    const T* logits = static_cast<const T*>(args.logits) + row.logits;
#pragma unroll
    for (int i = 0; i < N; i += kRun) {
      const int64_t col = column(begin, i, thread, threads);
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
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float v = value[i];
      bool masked = v <= args.floor;  // so is a column beyond the end of the row
      value[i] = v < kInf ? __fmul_rn(v, form.factor) : NAN;
      low[i] = 0.f;
      if (kMask && !masked) {
        const int64_t at = row.mask + column(begin, i, thread, threads) * args.mask.col_stride;
        if (!form.low) {
          masked = !static_cast<const uint8_t*>(args.mask.data)[at];
        } else {
          const float bias = mask_value(args.mask, at);
          masked = bias <= args.mask.floor;
          // Product and sum without their roundings: scores of 1e4 would err by 5e-4 otherwise.
          const float product = value[i], total = product + bias;
          float rest = fmaf(v, form.factor, -product) + (v * form.factor_low + lost_in_sum(product, bias, total));
          rest = rest - rest == 0.f ? rest : 0.f;  // beyond the range of a float nothing was lost that counts
          const float score =
              total + rest;  // where the mask cancels the product, `rest` is more than half an ulp of it
          low[i] = score - score == 0.f ? rest - (score - total) : 0.f;
          value[i] = v < kInf ? score : NAN;
        }
      }
      if (masked) value[i] = -kInf;
    }
  }
};

// The score of key 0, unscaled: -inf where it is masked.
template <class T>
__device__ double first_score(const AttentionStatsArgs& args, const Form& form, const Row& row) {
  if (row.cols == 0) return -kInf;
  const float v = to_float(static_cast<const T*>(args.logits)[row.logits]);
  if (v <= args.floor) return -kInf;
  if (args.mask.data == nullptr) return v * form.factor;
  if (!form.low) return static_cast<const uint8_t*>(args.mask.data)[row.mask] ? v * form.factor : -kInf;
  const float bias = mask_value(args.mask, row.mask);
  return bias <= args.mask.floor ? -double(kInf) : v * args.scale + bias;
}

// Columns [begin, row.cols) by the calling threads, merged over each warp.
template <class T, bool kVector, bool kMask, int kBytes>
__device__ __forceinline__ RowTotal total_of(const AttentionStatsArgs& args, const Form& form, const Row& row,
                                             int64_t begin, int thread, int threads, int& keys) {
  using Part = Slice<T, kVector, kMask, kBytes>;
  RowLane lane;
  for (; begin < row.cols; begin += int64_t{Part::N} * threads) {
    Part part;
    part.read(args, form, row, begin, thread, threads);
    if (form.first) {
#pragma unroll
      for (int i = 0; i < Part::N; ++i) keys += part.value[i] != -kInf;
    }
    if (kMask && form.low) lane.template push<Part::N, kMask>(part.value, part.low, form.exponential);
    else lane.template push<Part::N, false>(part.value, part.low, form.exponential);
  }
  return merge_warp(RowTotal::of(lane), form.exponential);
}

template <class T, bool kVector, bool kMask>
__global__ void __launch_bounds__(kThreads)
    stats_by_warp(AttentionStatsArgs args, Form form, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (item >= items) return;
  const int thread = threadIdx.x % kWarpSize;
  const Row row = row_of(args, item);
  int keys = 0;
  const RowTotal total =
      total_of<T, kVector, kMask, kSlice<kVector, kMask>>(args, form, row, 0, thread, kWarpSize, keys);
  keys = warp_sum(keys);
  if (thread != 0) return;
  const double first = form.first ? first_score<T>(args, form, row) : -kInf;
  write_row(total, keys, first, form.scale, form.exponential, row.index, args.out);
}

constexpr int kWarps = kThreads / kWarpSize;

struct BlockMemory {
  RowTotal totals[kWarps];
  int keys[kWarps];
};

// How a row is cut: into `count` pieces of `cols` columns, the last ones shorter or empty.
struct Cuts {
  int64_t count, cols;

  static Cuts of(int64_t count, int64_t all) {
    constexpr int64_t kAlign = kLeastSlice;  // pieces begin where whole vectors of a warp do
    return {count, ((all + count - 1) / count + kAlign - 1) / kAlign * kAlign};
  }
};

// A float log-sum-exp of this size is too coarse for probabilities.
__device__ __forceinline__ bool is_large(float lse) { return lse - lse == 0.f && fabsf(lse) > kLargeLse; }

// A row, or one part of it, whose state then goes to args.parts. With `lse`: only rows where that is large.
template <class T, bool kVector, bool kMask>
__global__ void __launch_bounds__(kThreads, kResident)
    stats_by_block(AttentionStatsArgs args, Form form, Cuts cuts, const float* lse) {
  static_assert(kWarps <= kWarpSize);
  BlockMemory& memory = shared<BlockMemory>();
  Row row = row_of(args, blockIdx.x / cuts.count);
  if (lse != nullptr && !is_large(lse[row.index])) return;
  const int64_t begin = blockIdx.x % cuts.count * cuts.cols;
  if (begin + cuts.cols < row.cols) row.cols = begin + cuts.cols;
  int keys = 0;
  RowTotal total =
      total_of<T, kVector, kMask, kSlice<kVector, kMask>>(args, form, row, begin, threadIdx.x, kThreads, keys);
  keys = warp_sum(keys);
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) memory.totals[warp] = total, memory.keys[warp] = keys;
  __syncthreads();
  if (warp != 0) return;
  total = threadIdx.x < kWarps ? memory.totals[threadIdx.x] : RowTotal{};
  total = merge_warp(total, form.exponential);
  keys = warp_sum(threadIdx.x < kWarps ? memory.keys[threadIdx.x] : 0);
  if (threadIdx.x != 0) return;
  if (args.parts != nullptr) {
    args.parts[blockIdx.x] = {total.below, total.dot, total.max, total.square, total.tops, keys};
    return;
  }
  const double first = form.first ? first_score<T>(args, form, row) : -kInf;
  write_row(total, keys, first, form.scale, form.exponential, row.index, args.out);
}

// One warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    stats_of_parts(AttentionStatsArgs args, Form form, int64_t parts, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (item >= items) return;
  const Row row = row_of(args, item);
  int keys;
  const RowTotal total = merge_parts(args.parts + item * parts, parts, form.exponential, keys);
  if (threadIdx.x % kWarpSize != 0) return;
  const double first = form.first ? first_score<T>(args, form, row) : -kInf;
  write_row(total, keys, first, form.scale, form.exponential, row.index, args.out);
}

__device__ __forceinline__ float at(const float* values, int64_t i) { return values == nullptr ? 0.f : values[i]; }

// One warp a row, or a slice of it. G is the dtype of the gradient: that of the logits, or float32 for the gradient of
// the scores.
template <class T, class G, bool kVector, bool kMask>
__global__ void __launch_bounds__(kThreads, kResidentBackward<kMask>)
    backward_by_warp(AttentionStatsBackwardArgs args, Form form, Exponential unscaled, int64_t items, Cuts slices,
                     int64_t parts) {
  using Part = Slice<T, kVector, kMask, kOtherSlice>;
  constexpr float kNothing = -80.f;  // e^-80 is 0 here
  const int64_t piece = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize, item = piece / slices.count;
  if (item >= items) return;
  const int thread = threadIdx.x % kWarpSize;
  const Row row = row_of(args.forward, item);
  const float lse = args.rows.lse[row.index], scale = static_cast<float>(form.scale);
  float top = 0.f, log_sum = lse;  // log p = (value - top) * scale - log_sum
  if (is_large(lse)) {
    int keys = 0;
    const RowTotal total =
        args.forward.parts != nullptr
            ? merge_parts(args.forward.parts + item * parts, parts, form.exponential, keys)
            : total_of<T, kVector, kMask, kOtherSlice>(args.forward, form, row, 0, thread, kWarpSize, keys);
    top = total.max;
    log_sum = static_cast<float>(log1p(total.below + (total.tops - 1)));
  }
  const float g = at(args.rows.grad_entropy, row.index) * args.out_scale;
  const float c = 2.f * at(args.rows.grad_collision, row.index) * args.out_scale;
  float sink = at(args.rows.grad_sink, row.index) * args.out_scale;
  if (sink != 0.f) sink *= args.rows.sink[row.index];
  float constant = at(args.rows.grad_lse, row.index) * args.out_scale - g * args.rows.entropy[row.index] - sink;
  if (c != 0.f) constant -= c * args.rows.collision[row.index];

  G* out = static_cast<G*>(args.grad) + row.index * args.forward.cols;
  const int64_t first = (piece - item * slices.count) * slices.cols, last = first + slices.cols;
  for (int64_t begin = first; begin < last && begin < args.forward.cols; begin += int64_t{Part::N} * kWarpSize) {
    Part part;
    part.read(args.forward, form, row, begin, thread, kWarpSize);
#pragma unroll
    for (int i = 0; i < Part::N; ++i) {
      float u = part.value[i] - top;
      if (kMask && form.low) u += part.low[i];
      u = at_least(fmaf(u, scale, -log_sum), kNothing);
      const float p = u == kNothing ? 0.f : unscaled(u);
      const int64_t col = Part::column(begin, i, thread, kWarpSize);
      float slope = p * (fmaf(p, c, constant) - g * u);
      if (col == 0) slope += sink;
      if (part.value[i] == -kInf) slope = 0.f;  // also in a row without keys, or one that is NaN
      if (col < args.forward.cols) put(out + col, slope);
    }
  }
}

bool vectors_fit(const AttentionStatsArgs& args, size_t size) {
  const auto whole = [size](int64_t stride) { return stride * static_cast<int64_t>(size) % kVectorBytes == 0; };
  bool fits =
      args.col_stride == 1 && reinterpret_cast<uintptr_t>(args.logits) % kVectorBytes == 0 && whole(args.row_stride);
  for (int32_t d = 0; d < args.dims; ++d) fits = fits && whole(args.strides[d]);
  return fits;
}

dim3 grid_of_warps(int64_t items) {
  return dim3(static_cast<unsigned>((items + kThreads / kWarpSize - 1) / (kThreads / kWarpSize)));
}

// The states of the parts of all rows; with `lse`, of those where it is large.
template <class T, bool kVector, bool kMask>
int run_parts(const AttentionStatsArgs& args, const Form& form, const float* lse, void* stream) {
  if (args.parts == nullptr) return cudaErrorInvalidValue;
  const int64_t items = args.batch * args.rows;
  const Cuts cuts = Cuts::of(row_parts(items, args.cols), args.cols);
  return launch(stats_by_block<T, kVector, kMask>, dim3(static_cast<unsigned>(items * cuts.count)), dim3(kThreads),
                sizeof(BlockMemory), stream, args, form, cuts, lse);
}

template <class T, bool kVector, bool kMask>
int run_stats(const AttentionStatsArgs& args, void* stream) {
  const Form form = form_of(args);
  const int64_t items = args.batch * args.rows;
  if (items == 0) return cudaSuccess;
  const int64_t parts = row_parts(items, args.cols);
  if (parts > 1) {
    const int error = run_parts<T, kVector, kMask>(args, form, nullptr, stream);
    if (error != cudaSuccess) return error;
    return launch(stats_of_parts<T>, grid_of_warps(items), dim3(kThreads), 0, stream, args, form, parts, items);
  }
  if (args.cols >= kLongRow && items < kFewRows) {
    return launch(stats_by_block<T, kVector, kMask>, dim3(items), dim3(kThreads), sizeof(BlockMemory), stream, args,
                  form, Cuts::of(1, args.cols), nullptr);
  }
  return launch(stats_by_warp<T, kVector, kMask>, grid_of_warps(items), dim3(kThreads), 0, stream, args, form, items);
}

template <class T>
int run_stats(const AttentionStatsArgs& args, void* stream) {
  if (vectors_fit(args, sizeof(T)))
    return args.mask.data ? run_stats<T, true, true>(args, stream) : run_stats<T, true, false>(args, stream);
  return args.mask.data ? run_stats<T, false, true>(args, stream) : run_stats<T, false, false>(args, stream);
}

template <class T, class G, bool kVector, bool kMask>
int run_backward(const AttentionStatsBackwardArgs& args, void* stream) {
  const Form form = form_of(args.forward);
  const Exponential unscaled = Exponential::of(1.0);
  const int64_t items = args.forward.batch * args.forward.rows, cols = args.forward.cols;
  if (items == 0 || cols == 0) return cudaSuccess;
  const Cuts slices = Cuts::of(row_slices(items, cols), cols);
  if (slices.count > 1) {
    const int error = run_parts<T, kVector, kMask>(args.forward, form, args.rows.lse, stream);
    if (error != cudaSuccess) return error;
  }
  return launch(backward_by_warp<T, G, kVector, kMask>, grid_of_warps(items * slices.count), dim3(kThreads), 0, stream,
                args, form, unscaled, items, slices, row_parts(items, cols));
}

template <class T, class G>
int run_backward(const AttentionStatsBackwardArgs& args, void* stream) {
  if (vectors_fit(args.forward, sizeof(T)))
    return args.forward.mask.data ? run_backward<T, G, true, true>(args, stream)
                                  : run_backward<T, G, true, false>(args, stream);
  return args.forward.mask.data ? run_backward<T, G, false, true>(args, stream)
                                : run_backward<T, G, false, false>(args, stream);
}

}  // namespace

int attention_stats_cuda(const AttentionStatsArgs& args, void* stream) {
  switch (args.dtype) {
    case DType::f32: return run_stats<float>(args, stream);
    case DType::bf16: return run_stats<BF16>(args, stream);
    default: return run_stats<F16>(args, stream);
  }
}

int attention_stats_backward_cuda(const AttentionStatsBackwardArgs& args, void* stream) {
  const bool of_scores = args.grad_dtype == DType::f32;
  switch (args.forward.dtype) {
    case DType::f32: return run_backward<float, float>(args, stream);
    case DType::bf16:
      return of_scores ? run_backward<BF16, float>(args, stream) : run_backward<BF16, BF16>(args, stream);
    default: return of_scores ? run_backward<F16, float>(args, stream) : run_backward<F16, F16>(args, stream);
  }
}

}  // namespace inflection
