// Instructions of tensor cores and of asynchronous copies, one function each, with a second version for the emulator.
//
// In mma m16n8k16 lane l, with g = l / 4 and t = l % 4, holds of A (16 x 16) rows g and g + 8, columns 2t, 2t + 1, 2t + 8,
// 2t + 9; of B (16 x 8) rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g; of C (16 x 8) rows g and g + 8, columns 2t, 2t + 1.
// ldmatrix loads four 8 x 8 matrices: lane l provides the 16-byte aligned address of row l % 8 of matrix l / 8, and
// receives row g, columns 2t and 2t + 1, of each matrix; transposed: rows 2t and 2t + 1 of column g.
#pragma once

#include "pairs.cuh"

namespace inflection {

#ifdef INFLECTION_EMULATION

inline unsigned shared_address(const void* p) { return emulator::shared_offset(p); }
template <class T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma(c, a, b0, b1, [](uint16_t bits) { return to_float(T{bits}); }, EMULATOR_PLACE("mma"));
}
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  emulator::ldmatrix(r, row, false, EMULATOR_PLACE("ldmatrix"));
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  emulator::ldmatrix(r, row, true, EMULATOR_PLACE("ldmatrix.trans"));
}
template <class T>
inline uint32_t minus(uint32_t x, uint32_t y) {
  T out[2];
  for (int i = 0; i < 2; ++i)
    put(&out[i], to_float(T{static_cast<uint16_t>(x >> 16 * i)}) - to_float(T{static_cast<uint16_t>(y >> 16 * i)}));
  return out[0].bits | uint32_t{out[1].bits} << 16;
}
inline void copy_async(void* to, const void* from, bool exists) { emulator::copy_later(to, from, 16, exists ? 16 : 0); }
inline void commit_copies() { emulator::commit_copies(); }
template <int kPending>
inline void wait_for_copies() {
  emulator::wait_for_copies(kPending);
}

#else

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

#define IF_MMA(format)                                           \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." format "." format \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "             \
      "{%0,%1,%2,%3};"                                           \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BF16>) IF_MMA("bf16");
  else IF_MMA("f16");
}
#undef IF_MMA
#define IF_LDMATRIX(name, kind)                                                          \
  __device__ __forceinline__ void name(uint32_t (&r)[4], const void* row) {              \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" kind ".shared.b16 {%0,%1,%2,%3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                        \
                 : "r"(shared_address(row))                                              \
                 : "memory");                                                            \
  }
IF_LDMATRIX(ldmatrix, "")
IF_LDMATRIX(ldmatrix_transposed, ".trans")
#undef IF_LDMATRIX
// Both 16-bit numbers of x less those of y. bf16 has no subtraction before sm_90, hence 1 x - y.
template <class T>
__device__ __forceinline__ uint32_t minus(uint32_t x, uint32_t y) {
  uint32_t out;
  if constexpr (std::is_same_v<T, BF16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(0x3f803f80u), "r"(y ^ 0x80008000u));
  else asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
  return out;
}
// Copies 16 bytes from global to shared memory; without reading anything writes zeros if they do not exist.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups of copies of this thread are pending.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace inflection
