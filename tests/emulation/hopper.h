// Hopper's own instructions as the PTX manual describes them, those that this package's kernels use: barriers that
// count threads and bytes (mbarrier), copies of boxes of a tensor (cp.async.bulk.tensor), products of a warp group
// (wgmma).
//
// What is asynchronous there is as unkind here as it may be. A box arrives at any time after its copy was issued, in
// any order. A product is carried out when it is waited for: its accumulators are NaN until then where it does not add
// to them, and whoever overwrites its matrix in shared memory before that has spoilt it. The four warps of a group
// carry out their quarters on their own, nothing else holds them together.
//
// An error, besides those of emulator.h: a barrier that nobody initialised, more arrivals in a phase than it was made
// for, more bytes than it can count; a box to an address where its pattern does not begin; a tensor that the driver
// would not describe; a product without a fence since the last wait, or of a matrix that lies otherwise than emulated
// here; a thread that ends before its products are waited for, warps of a group with different numbers of products, a
// block that ends before its boxes have arrived.
//
// What it cannot show: fences between ordinary and asynchronous accesses (everything here is in one order), how many
// registers setmaxnreg moves, the rounding of wgmma (taken to be that of mma: one cut-off for 16 products).
#pragma once

#include <array>
#include <cstdint>

#include "emulator.h"

namespace emulator {

void mbarrier_init(uint64_t* barrier, unsigned threads);
void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes);  // announces the bytes first
void mbarrier_wait(uint64_t* barrier, unsigned parity, const Place& place);

constexpr int kMostTensorDims = 5;

struct TensorMap {
  const unsigned char* data;
  int dims;
  uint64_t sizes[kMostTensorDims], strides[kMostTensorDims];  // innermost first; strides in bytes
  uint32_t box[kMostTensorDims];
};

// Of 16-bit numbers, swizzled by 128 bytes; `strides` without the innermost. Not 0 where the driver would refuse it.
int describe_tensor(TensorMap& map, const void* data, int dims, const uint64_t* sizes, const uint64_t* strides,
                    const uint32_t* box);
void copy_box(void* to, const TensorMap& map, const std::array<int, 4>& first, uint64_t* barrier);

using Widen = float (*)(uint16_t);  // the number that 16 bits stand for

void wgmma_fence(const Place& place);
void wgmma_commit(const Place& place);
void wgmma_wait(size_t pending, const Place& place);
// C (64 x cols) += A (64 x 16) B (16 x cols): registers `c` [cols / 2] and `a` [4] of a lane, the description of B.
void wgmma(float* c, int cols, const uint32_t* a, uint64_t b, bool add, Widen widen, const Place& place);

// 16 products added to c as one sum, which is then cut off, not rounded: no device is documented to do better.
float sum_of_products(float c, const float (&a)[16], const float (&b)[16]);

}  // namespace emulator
