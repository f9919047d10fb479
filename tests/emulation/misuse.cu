// What the emulator claims to catch, one kernel each, and what it has to get right. `misuse CASE [SEED]` runs one.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <type_traits>

#include "hopper_cases.h"
#include "mma.cuh"

using namespace inflection;

namespace {

constexpr int kThreads = 64;

struct Memory {
  alignas(16) float values[kThreads];
  int count;
};

float result[kThreads];
alignas(16) float source[kThreads];

void sum_of_block() {
  Memory& memory = shared<Memory>();
  const float total = warp_sum(float(threadIdx.x));
  if (threadIdx.x % kWarpSize == 0) memory.values[threadIdx.x / kWarpSize] = total;
  __syncthreads();
  result[threadIdx.x] = memory.values[0] + memory.values[1];
}
void barrier_that_some_never_reach() {
  if (threadIdx.x < 40) __syncthreads();
}
void two_barriers_at_once() {
  if (threadIdx.x < kWarpSize) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void shuffle_that_some_never_reach() {
  if (threadIdx.x % kWarpSize < 31) result[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
}
void lanes_that_disagree_about_the_mask() {
  const unsigned mask = threadIdx.x % 2 ? 0xffffffffu : 0x7fffffffu;
  __shfl_xor_sync(mask, 1.f, 2);
}
void lane_outside_its_own_mask() { __shfl_xor_sync(0xfffffffeu, 1.f, 0); }
void shuffle_from_outside_the_mask() {
  if (threadIdx.x % kWarpSize < 16) __shfl_sync(0xffffu, 1.f, 20);
}
void index_beyond_shared_memory() { shared<Memory>().values[threadIdx.x + sizeof(Memory) / sizeof(float)] = 1.f; }
void shared_memory_never_written() { result[threadIdx.x] = shared<Memory>().values[threadIdx.x]; }
void neighbour_read_without_a_barrier() {
  Memory& memory = shared<Memory>();
  memory.values[threadIdx.x] = float(threadIdx.x);
  result[threadIdx.x] = memory.values[(threadIdx.x + 1) % kThreads];
}
void counter_that_is_not_atomic() {
  Memory& memory = shared<Memory>();
  if (threadIdx.x == 0) memory.count = 0;
  __syncthreads();
  const int old = memory.count;
  __syncwarp();
  memory.count = old + 1;
  __syncthreads();
  result[threadIdx.x] = float(memory.count);
}
void copy_then_read(bool wait) {
  Memory& memory = shared<Memory>();
  const int at = threadIdx.x / 4 * 4;
  if (threadIdx.x % 4 == 0) copy_async(&memory.values[at], &source[at], true);
  commit_copies();
  if (wait) wait_for_copies<0>();
  __syncthreads();
  result[threadIdx.x] = memory.values[threadIdx.x];
  wait_for_copies<0>();
}
void copy_read_when_it_has_arrived() { copy_then_read(true); }
void copy_read_too_early() { copy_then_read(false); }
void copy_that_nobody_waits_for() {
  copy_async(shared<Memory>().values, source, true);
  commit_copies();
}
void copy_to_a_crooked_address() { copy_async(&shared<Memory>().values[1], source, true); }
void matrix_at_a_crooked_address() {
  uint32_t r[4];
  ldmatrix(r, &shared<Memory>().values[threadIdx.x % 2]);
}

// C = A B for A [16, 16] and B [16, 8]; with kTransposed B is stored by rows, otherwise by columns.
// NaN with 1, zeros, subnormal numbers, infinities, 1 with itself; the odd threads have them in the back half.
template <class T>
uint32_t of_pairs(int which) {
  constexpr bool kWide = std::is_same_v<T, BF16>;
  constexpr uint16_t kOne = kWide ? 0x3f80 : 0x3c00, kInfinite = kWide ? 0x7f80 : 0x7c00, kSome = kInfinite + 1;
  constexpr uint16_t a[] = {kSome, kOne, 0x8000, 0, 0x0001, kInfinite, kInfinite | 0x8000, kOne};
  constexpr uint16_t b[] = {kOne, kSome, 0, 0x8000, 0x8001, kOne, kOne | 0x8000, kOne};
  const int i = threadIdx.x / 2 % 8, half = threadIdx.x % 2 * 16;
  const uint32_t x = uint32_t{a[i]} << half, y = uint32_t{b[i]} << half;
  const uint32_t both = which == 0 ? larger<T>(x, y) : which == 1 ? smaller<T>(x, y) : equal(x, y);
  return both >> half & 0xffff;
}
void pairs() {
  const int which = threadIdx.x / 16;
  result[threadIdx.x] = float(which == 3 ? of_pairs<BF16>(0) : of_pairs<F16>(which));
}

struct Matrices {
  alignas(16) BF16 a[16][16], b[2][16][16];
};
float product[16][8];
BF16 left[16][16], right[16][8];

template <bool kTransposed>
void product_of_matrices() {
  Matrices& memory = shared<Matrices>();
  const int lane = threadIdx.x % kWarpSize;
  if (threadIdx.x < kWarpSize) {
    for (int i = lane; i < 256; i += kWarpSize) memory.a[i / 16][i % 16] = left[i / 16][i % 16];
    for (int i = lane; i < 256; i += kWarpSize) {
      const int k = kTransposed ? i / 16 : i % 16, n = kTransposed ? i % 16 : i / 16;
      memory.b[0][i / 16][i % 16] = n < 8 ? right[k][n] : BF16{};
    }
  }
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  uint32_t a[4], b[4];
  ldmatrix(a, &memory.a[lane % 16][lane / 16 * 8]);
  if (kTransposed) ldmatrix_transposed(b, &memory.b[0][lane % 16][lane / 16 * 8]);
  else ldmatrix(b, &memory.b[0][lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
  float c[4] = {};
  mma<BF16>(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = c[i];
}

int check_product() {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 0.f;
      for (int k = 0; k < 16; ++k) sum += to_float(left[i][k]) * to_float(right[k][j]);
      if (sum != product[i][j]) return printf("element %d %d is %g, not %g\n", i, j, product[i][j], sum), 1;
    }
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = arguments[1];
  emulator::seed(count > 2 ? strtoull(arguments[2], nullptr, 10) : 0);
  if (int result; hopper_cases::run_case(name, result)) return result;
  for (int i = 0; i < kThreads; ++i) source[i] = float(i);
  for (int i = 0; i < 256; ++i) put(&left[i / 16][i % 16], float(i * 7 % 31 - 15));
  for (int i = 0; i < 128; ++i) put(&right[i / 8][i % 8], float(i * 5 % 23 - 11));
#define CASE(name) \
  {                \
    #name, name    \
  }
  const std::map<std::string, void (*)()> cases = {CASE(sum_of_block),
                                                   CASE(barrier_that_some_never_reach),
                                                   CASE(two_barriers_at_once),
                                                   CASE(shuffle_that_some_never_reach),
                                                   CASE(lanes_that_disagree_about_the_mask),
                                                   CASE(lane_outside_its_own_mask),
                                                   CASE(shuffle_from_outside_the_mask),
                                                   CASE(index_beyond_shared_memory),
                                                   CASE(shared_memory_never_written),
                                                   CASE(neighbour_read_without_a_barrier),
                                                   CASE(counter_that_is_not_atomic),
                                                   CASE(copy_read_when_it_has_arrived),
                                                   CASE(copy_read_too_early),
                                                   CASE(copy_that_nobody_waits_for),
                                                   CASE(copy_to_a_crooked_address),
                                                   CASE(matrix_at_a_crooked_address),
                                                   CASE(pairs),
                                                   {"too_many_threads", sum_of_block},
                                                   {"too_much_shared_memory", sum_of_block},
                                                   {"product_by_columns", product_of_matrices<false>},
                                                   {"product_by_rows", product_of_matrices<true>}};
  const unsigned threads = name == "too_many_threads" ? 1056 : kThreads;
  const size_t bytes = name == "too_much_shared_memory" ? 228 << 10
                       : name.starts_with("product")    ? sizeof(Matrices)
                                                        : sizeof(Memory);
  launch(cases.at(name), dim3(1), dim3(threads), bytes, nullptr);
  if (name.starts_with("product")) return check_product();
  for (float x : result) printf("%g ", x);
  return 0;
}
