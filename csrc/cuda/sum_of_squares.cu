// Sums of squares of many tensors, one launch for up to kEntries of them.
//
// A block sums one chunk of one tensor in float64; a second launch adds the chunks of each group in order, so the result is
// deterministic. The table of tensors is a kernel parameter, which needs no copy to the device. Bound by memory: each
// element is read once, 16 bytes per thread.
#include "warp.cuh"

namespace inflection {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int kEntries = 1024;  // 24 bytes each, within the 32,764 bytes of parameters that CUDA 12.1 and sm_70 allow
constexpr int kMergeThreads = 32;

struct Entry {  // a contiguous tensor
  const void* data;
  int64_t numel;
  DType dtype;
};

struct Table {
  Entry entries[kEntries];
  int32_t first_chunk[kEntries + 1];  // relative to the launch
  int32_t count;
};

__device__ int entry_of(const Table& table, int chunk) {  // the last entry that begins at or before the chunk
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) low = middle;
    else high = middle;
  }
  return low;
}

template <class T>
__device__ double squares(const T* data, int64_t count) {
  constexpr int kPerVector = kVectorBytes / sizeof(T);
  double total = 0.0;
  // Elements before the first 16-byte boundary and behind the last one are read one by one.
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) / sizeof(T) % kPerVector);
  int64_t head = misaligned ? kPerVector - misaligned : 0;
  head = head < count ? head : count;
  const int64_t vectors = (count - head) / kPerVector;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 raw = *reinterpret_cast<const uint4*>(data + head + i * kPerVector);
    T values[kPerVector];
    memcpy(values, &raw, sizeof raw);
#pragma unroll
    for (int j = 0; j < kPerVector; ++j) {
      const double x = to_float(values[j]);
      total += x * x;
    }
  }
  const int64_t tail = head + vectors * kPerVector;
  for (int64_t i = threadIdx.x; i < head + count - tail; i += kThreads) {
    const double x = to_float(data[i < head ? i : tail + i - head]);
    total += x * x;
  }
  return total;
}

__global__ void __launch_bounds__(kThreads)
    sum_chunks(Table table, const int32_t* flag, double* partial /* [chunks] */) {
  if (flag && *flag == 0) return;
  const int chunk = blockIdx.x;
  const int which = entry_of(table, chunk);
  const Entry& entry = table.entries[which];
  const int64_t begin = (chunk - table.first_chunk[which]) * kSquaresChunk;
  const int64_t count = entry.numel - begin < kSquaresChunk ? entry.numel - begin : kSquaresChunk;
  double total = for_dtype(
      entry.dtype, [&](auto zero) { return squares(static_cast<const decltype(zero)*>(entry.data) + begin, count); });
  total = block_sum<kThreads>(total, &shared<double>());
  if (threadIdx.x == 0) partial[chunk] = total;
}

// A tensor that is not contiguous: each thread computes the address of each of its elements.
__global__ void __launch_bounds__(kThreads)
    sum_strided(Operand op, const int32_t* flag, double* partial /* [chunks of op] */) {
  if (flag && *flag == 0) return;
  const int64_t begin = blockIdx.x * kSquaresChunk;
  const int64_t end = begin + kSquaresChunk < op.numel ? begin + kSquaresChunk : op.numel;
  double total = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    int64_t index = i, offset = 0;
    for (int d = 0; d < op.dims; ++d) {
      offset += index % op.sizes[d] * op.strides[d];
      index /= op.sizes[d];
    }
    const double x =
        for_dtype(op.dtype, [&](auto zero) { return to_float(static_cast<const decltype(zero)*>(op.data)[offset]); });
    total += x * x;
  }
  total = block_sum<kThreads>(total, &shared<double>());
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

struct Groups {
  int32_t group[kEntries];
  int32_t first_chunk[kEntries + 1];
  int32_t count;
};

// One warp per group. Adds its chunks, in a fixed order, to those of the previous launches; the last launch scales.
__global__ void __launch_bounds__(kMergeThreads)
    merge_groups(Groups groups, const double* partial, double* totals /* [groups] */, bool first, bool last,
                 const float* inv_scale, double* out /* [groups] */) {
  double total = 0.0;
  for (int i = 0; i < groups.count; ++i) {
    if (groups.group[i] != static_cast<int>(blockIdx.x)) continue;
    for (int chunk = groups.first_chunk[i] + threadIdx.x; chunk < groups.first_chunk[i + 1]; chunk += kMergeThreads)
      total += partial[chunk];
  }
  total = warp_sum(total);
  if (threadIdx.x != 0) return;
  if (!first) total += totals[blockIdx.x];
  totals[blockIdx.x] = total;
  const double inverse = inv_scale ? *inv_scale : 1.0;
  if (last) out[blockIdx.x] = total * (inverse * inverse);
}

bool is_contiguous(const Operand& op) { return op.dims == 1 && op.strides[0] == 1; }

}  // namespace

int sum_of_squares_cuda(const SumOfSquaresArgs& args, void* stream) {
  constexpr size_t kShared = sizeof(double) * kThreads / kWarpSize;
  Table table;
  for (int64_t begin = 0; begin < args.count;) {
    if (!is_contiguous(args.operands[begin])) {
      const int64_t first = args.first_chunk[begin], chunks = args.first_chunk[begin + 1] - first;
      if (chunks > 0) {
        const int error = launch(sum_strided, dim3(chunks), dim3(kThreads), kShared, stream, args.operands[begin],
                                 args.flag, args.partial + first);
        if (error) return error;
      }
      ++begin;
      continue;
    }
    int64_t end = begin;
    const int64_t first = args.first_chunk[begin];
    for (; end < args.count && end - begin < kEntries && is_contiguous(args.operands[end]); ++end) {
      const Operand& op = args.operands[end];
      table.entries[end - begin] = {op.data, op.numel, op.dtype};
      table.first_chunk[end - begin] = static_cast<int32_t>(args.first_chunk[end] - first);
    }
    table.count = static_cast<int32_t>(end - begin);
    const int64_t chunks = args.first_chunk[end] - first;
    table.first_chunk[table.count] = static_cast<int32_t>(chunks);
    if (chunks > 0) {
      const int error =
          launch(sum_chunks, dim3(chunks), dim3(kThreads), kShared, stream, table, args.flag, args.partial + first);
      if (error) return error;
    }
    begin = end;
  }
  return cudaSuccess;
}

int sum_of_squares_merge_cuda(const SumOfSquaresArgs& args, void* stream) {
  Groups groups;
  for (int64_t begin = 0; begin < args.count; begin += kEntries) {
    const int64_t end = begin + kEntries < args.count ? begin + kEntries : args.count;
    const int64_t first = args.first_chunk[begin];
    for (int64_t i = begin; i < end; ++i) {
      groups.group[i - begin] = args.operands[i].group;
      groups.first_chunk[i - begin] = static_cast<int32_t>(args.first_chunk[i] - first);
    }
    groups.count = static_cast<int32_t>(end - begin);
    groups.first_chunk[groups.count] = static_cast<int32_t>(args.first_chunk[end] - first);
    const int error = launch(merge_groups, dim3(args.groups), dim3(kMergeThreads), 0, stream, groups,
                             static_cast<const double*>(args.partial + first), args.totals, begin == 0,
                             end == args.count, args.inv_scale, args.out);
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace inflection
