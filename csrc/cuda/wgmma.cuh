// Asynchronous products of a warp group of four warps: C (64 x 128) += A (64 x 16) B (16 x 128), A from registers, B from
// shared memory. There is a second version for the emulator. sm_90a.
//
// Warp w of the group has rows 16 w to 16 w + 15 of A and C. Its lane l, with g = l / 4 and t = l % 4, holds A as in mma
// m16n8k16 (mma.cuh), and in c[4 n + i] columns 8 n + 2t + i % 2 of C, row g for i < 2, else row g + 8.
//
// B is stored as by copy_box (tensor_copy.cuh): column n of B is a row of 128 bytes, 64 numbers of the depth, of which a
// product reads 16. The registers of a product must not be accessed between wgmma_fence() and wgmma_wait(), and B must not
// change until the wait.
#pragma once

#include "tensor_copy.cuh"

namespace inflection {

constexpr int kGroupThreads = 128;
constexpr int kGroupRows = 64;
constexpr int kProductCols = 128;                 // of B
constexpr int kProductDepth = 16;                 // of A and B
constexpr int kProductFloats = kProductCols / 2;  // of C per thread

// The matrix descriptor of B: address of its first byte divided by 16; distance of groups of eight rows; kind of swizzle.
// The field in between (bits 16 to 29) is not used for swizzled rows.
__device__ __forceinline__ uint64_t swizzled_matrix(unsigned address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{kSwizzleAlign >> 4} << 32;
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | kEightRows | kSwizzle128;
}

#ifdef INFLECTION_EMULATION

inline void wgmma_fence() { emulator::wgmma_fence(EMULATOR_PLACE("wgmma.fence")); }
inline void wgmma_commit() { emulator::wgmma_commit(EMULATOR_PLACE("wgmma.commit_group")); }
template <int kPending>
inline void wgmma_wait() {
  emulator::wgmma_wait(kPending, EMULATOR_PLACE("wgmma.wait_group"));
}
inline void keep(float (&)[kProductFloats]) {}
template <class T, bool kAdd>
inline void wgmma(float (&c)[kProductFloats], const uint32_t (&a)[4], uint64_t b) {
  emulator::wgmma(c, kProductCols, a, b, kAdd, [](uint16_t bits) { return to_float(T{bits}); },
                  EMULATOR_PLACE("wgmma"));
}

#else

// Orders register accesses of this thread before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending groups of products are running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Prevents the compiler from moving reads of these registers before this place.
__device__ __forceinline__ void keep(float (&c)[kProductFloats]) {
#pragma unroll
  for (int i = 0; i < kProductFloats; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

#define IF_8(x, i) x(i), x(i + 1), x(i + 2), x(i + 3), x(i + 4), x(i + 5), x(i + 6), x(i + 7)
#define IF_64(x) IF_8(x, 0), IF_8(x, 8), IF_8(x, 16), IF_8(x, 24), IF_8(x, 32), IF_8(x, 40), IF_8(x, 48), IF_8(x, 56)
#define IF_SUM(i) "+f"(c[i])
#define IF_WGMMA(format)                                                                                               \
  asm volatile(                                                                                                        \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." format "." format                                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "    \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, " \
      "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "               \
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"                                                                    \
      : IF_64(IF_SUM)                                                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0))
template <class T, bool kAdd>
__device__ __forceinline__ void wgmma(float (&c)[kProductFloats], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, BF16>) IF_WGMMA("bf16");
  else IF_WGMMA("f16");
}
#undef IF_WGMMA
#undef IF_SUM
#undef IF_64
#undef IF_8

#endif

}  // namespace inflection
