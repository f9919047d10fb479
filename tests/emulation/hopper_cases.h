// Cases of misuse.cu that need Hopper's instructions: a block of one warp group.
#pragma once

#include <cstdio>
#include <map>
#include <string>

#include "wgmma.cuh"

namespace hopper_cases {

using namespace inflection;

constexpr int kDepth = 64;  // numbers of a row of a box
constexpr int kTensorRows = 150, kTensorDepth = 72, kHeads = 3;

struct Memory {
  alignas(kSwizzleAlign) uint16_t matrix[kProductCols][kDepth];
  Barrier barrier, other;
  int box[kProductCols][kDepth];
};

inline uint16_t tensor[2][kHeads][kTensorRows][kTensorDepth], left[kGroupRows][kDepth];
inline float product[kGroupRows][kProductCols];
inline int seen[kGroupThreads];

inline TensorMap map_of_tensor() {
  TensorMap map;
  constexpr uint64_t kRow = kTensorDepth * 2;
  const int error = describe({tensor,
                              {kTensorDepth, kTensorRows, kHeads, 2},
                              {kRow, kRow * kTensorRows, kRow * kTensorRows * kHeads},
                              {kDepth, kProductCols, 1, 1}},
                             map);
  if (error) printf("the tensor cannot be described\n");
  return map;
}

inline Memory& with_barrier(unsigned threads) {
  Memory& memory = shared<Memory>();
  if (threadIdx.x == 0) init(memory.barrier, threads), init(memory.other, threads);
  __syncthreads();
  return memory;
}

// A row of the box as it lies in the tensor, read through the swizzle.
inline uint16_t& at_of(Memory& memory, int row, int k) { return memory.matrix[row][k ^ row % 8 * 8]; }

// ---- what has to be right -------------------------------------------------------------------------------------------

template <int kX, int kY>
void box() {
  Memory& memory = with_barrier(1);
  static const TensorMap map = map_of_tensor();
  if (threadIdx.x == 0) {
    arrive_and_expect(memory.barrier, sizeof memory.matrix);
    copy_box(memory.matrix, map, kX, kY, 2, 1, memory.barrier);
  }
  wait(memory.barrier, 0);
  for (int k = 0; k < kDepth; ++k) {
    const int row = threadIdx.x, y = kY + row, x = kX + k;
    const bool inside = y >= 0 && y < kTensorRows && x >= 0 && x < kTensorDepth;
    if (at_of(memory, row, k) != (inside ? tensor[1][2][y][x] : 0)) printf("row %d, number %d\n", row, k);
  }
}

// Four rounds of a stage that one thread fills and all others read: wrong if a phase is taken for another.
void phases() {
  Memory& memory = shared<Memory>();
  if (threadIdx.x == 0) init(memory.barrier, 1), init(memory.other, kGroupThreads - 1);
  __syncthreads();
  int sum = 0;
  for (unsigned round = 0; round < 4; ++round) {
    if (threadIdx.x == 0) {
      wait(memory.other, round % 2 ^ 1);  // in the first round at once
      memory.box[0][0] = 1 << round;
      arrive(memory.barrier);
    } else {
      wait(memory.barrier, round % 2);
      sum = sum * 16 + memory.box[0][0];
      arrive(memory.other);
    }
  }
  seen[threadIdx.x] = sum;
}

enum class Fault { none, read_early, spoilt, no_fence, no_wait, one_warp_less };

template <class T, Fault kFault>
void product_of_group() {
  Memory& memory = with_barrier(1);
  for (int k = 0; k < kDepth; ++k) at_of(memory, threadIdx.x, k) = tensor[0][0][threadIdx.x][k];
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize, row = static_cast<int>(threadIdx.x) / kWarpSize * 16 + lane / 4;
  uint32_t a[kDepth / kProductDepth][4];
  for (int k = 0; k < kDepth / kProductDepth; ++k)
    for (int i = 0; i < 4; ++i) memcpy(&a[k][i], &left[row + i % 2 * 8][k * 16 + lane % 4 * 2 + i / 2 * 8], 4);
  float c[kProductFloats];
  const uint64_t matrix = swizzled_matrix(shared_address(memory.matrix));
  if (kFault != Fault::no_fence) wgmma_fence();
  if (kFault != Fault::one_warp_less || threadIdx.x >= kWarpSize) wgmma<T, false>(c, a[0], matrix);
  for (int k = 1; k < kDepth / kProductDepth; ++k) wgmma<T, true>(c, a[k], matrix + k * 2);
  wgmma_commit();
  const float early = c[0];
  if (kFault == Fault::no_wait) return;
  if (kFault == Fault::spoilt) at_of(memory, threadIdx.x, 5) = 0;
  __syncthreads();
  wgmma_wait<0>();
  if (kFault == Fault::read_early) c[0] = early;
  for (int i = 0; i < kProductFloats; ++i) product[row + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = c[i];
}

template <class T>
int check_product() {
  for (int i = 0; i < kGroupRows; ++i) {
    for (int j = 0; j < kProductCols; ++j) {
      float sum = 0.f;
      for (int k = 0; k < kDepth; ++k) sum += to_float(T{left[i][k]}) * to_float(T{tensor[0][0][j][k]});
      if (sum != product[i][j]) return printf("element %d %d is %g, not %g\n", i, j, product[i][j], sum), 1;
    }
  }
  return 0;
}

// ---- what has to be caught ------------------------------------------------------------------------------------------

inline void barrier_that_nobody_made() { arrive(shared<Memory>().barrier); }
inline void arrivals_beyond_the_phase() {
  Memory& memory = with_barrier(2);
  arrive_and_expect(memory.barrier, 16);
}
inline void bytes_that_never_arrive() {
  Memory& memory = with_barrier(1);
  static const TensorMap map = map_of_tensor();
  if (threadIdx.x == 0) {
    arrive_and_expect(memory.barrier, sizeof memory.matrix + 16);
    copy_box(memory.matrix, map, 0, 0, 0, 0, memory.barrier);
  }
  wait(memory.barrier, 0);
}
inline void box_inside_of_a_pattern() {
  Memory& memory = with_barrier(1);
  static const TensorMap map = map_of_tensor();
  copy_box(memory.matrix[1], map, 0, 0, 0, 0, memory.barrier);
}
inline void box_that_nobody_waits_for() {
  Memory& memory = with_barrier(1);
  static const TensorMap map = map_of_tensor();
  for (int i = 0; i < 9 && threadIdx.x == 0; ++i) copy_box(memory.matrix, map, 0, 0, 0, 0, memory.barrier);
}

// Whether there is such a case; it has been run.
inline bool run_case(const std::string& name, int& result) {
  static const std::map<std::string, void (*)()> cases = {
      {"box_inside", box<0, 0>},
      {"box_across_the_ends", box<24, 70>},
      {"box_before_the_beginning", box<-8, -3>},
      {"phases", phases},
      {"product_of_bf16", product_of_group<BF16, Fault::none>},
      {"product_of_f16", product_of_group<F16, Fault::none>},
      {"product_read_too_early", product_of_group<BF16, Fault::read_early>},
      {"product_of_a_matrix_overwritten", product_of_group<BF16, Fault::spoilt>},
      {"product_without_a_fence", product_of_group<BF16, Fault::no_fence>},
      {"product_that_nobody_waits_for", product_of_group<BF16, Fault::no_wait>},
      {"product_of_three_warps", product_of_group<BF16, Fault::one_warp_less>},
      {"barrier_that_nobody_made", barrier_that_nobody_made},
      {"arrivals_beyond_the_phase", arrivals_beyond_the_phase},
      {"bytes_that_never_arrive", bytes_that_never_arrive},
      {"box_inside_of_a_pattern", box_inside_of_a_pattern},
      {"box_that_nobody_waits_for", box_that_nobody_waits_for},
  };
  const auto found = cases.find(name);
  if (found == cases.end()) return false;
  const bool is_half = name.ends_with("_f16");
  for (size_t i = 0; i < sizeof tensor / 2; ++i) {
    const float x = static_cast<float>(static_cast<int>(i * 7 % 61) - 30);
    uint16_t& to = tensor[0][0][0][i];
    if (is_half) put(reinterpret_cast<F16*>(&to), x);
    else put(reinterpret_cast<BF16*>(&to), x);
  }
  for (int i = 0; i < kGroupRows * kDepth; ++i) {
    const float x = static_cast<float>(i * 5 % 23 - 11);
    if (is_half) put(reinterpret_cast<F16*>(&left[0][i]), x);
    else put(reinterpret_cast<BF16*>(&left[0][i]), x);
  }
  launch(found->second, dim3(1), dim3(kGroupThreads), sizeof(Memory), nullptr);
  result = 0;
  if (name.starts_with("product")) result = is_half ? check_product<F16>() : check_product<BF16>();
  for (int i = 1; name == "phases" && i < kGroupThreads; ++i)
    if (seen[i] != 0x1248) result = printf("thread %d saw %x\n", i, seen[i]);
  return true;
}

}  // namespace hopper_cases
