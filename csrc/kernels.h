// The border between tensors and kernels: every argument struct and every launcher.
//
// Launchers take raw pointers and strides in elements, write only where an output pointer says, never allocate, never
// synchronise and never throw. A `_cpu` launcher does the items [begin, end) of its work: the caller owns the threads.
// A `_cuda` launcher enqueues everything on `stream` and returns a cudaError_t as int.
#pragma once

#include <cstdint>

namespace inflection {

enum class DType : int32_t { f32, bf16, f16, boolean };

constexpr int kMaxDims = 8;  // dimensions in front of the rows of an operand

// ---- sum_of_squares -------------------------------------------------------------------------------------------------

// One tensor, its dimensions sorted by stride and merged where they are contiguous: the innermost is dimension 0.
struct Operand {
  const void* data;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];
  int64_t numel;
  int32_t dims;
  DType dtype;
  int32_t group;
};

constexpr int64_t kSquaresChunk = 1 << 14;  // elements of one work item: large against its overhead, small against a core's share

struct SumOfSquaresArgs {
  const Operand* operands;     // [count]
  const int64_t* first_chunk;  // [count + 1], running number of kSquaresChunk-sized work items; the last is their total
  int64_t count;
  int64_t groups;
  double* partial;             // [chunks], scratch: one sum per work item, so that the result does not depend on threads
  // outputs
  float* out;                  // [groups]
};
void sum_of_squares_cpu(const SumOfSquaresArgs&, int64_t begin, int64_t end);  // work items: chunks; fills `partial`
void sum_of_squares_merge_cpu(const SumOfSquaresArgs&, int64_t begin, int64_t end);  // work items: groups; fills `out`
int sum_of_squares_cuda(const SumOfSquaresArgs&, void* stream);
int sum_of_squares_merge_cuda(const SumOfSquaresArgs&, void* stream);

// ---- instruction sets of the CPU kernels ----------------------------------------------------------------------------

enum class Isa : int32_t { portable, avx2, avx512 };
// The best instruction set that this CPU has and this library was built with, at most `limit`; it is the one used from
// then on. Negative `limit`: change nothing. Returns the one in use.
int cpu_isa(int64_t limit);

}  // namespace inflection
