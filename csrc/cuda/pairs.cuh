// Two 16-bit numbers in a word, and instructions for both at once, with a second version for the emulator.
#pragma once

#include <type_traits>

#include "warp.cuh"

namespace inflection {

constexpr uint32_t kNanPair = 0x7fff7fffu;  // in both formats

template <class T>
struct Infinity;
template <>
struct Infinity<BF16> {
  static constexpr uint32_t kMinusPair = 0xff80ff80u;
};
template <>
struct Infinity<F16> {
  static constexpr uint32_t kMinusPair = 0xfc00fc00u;
};

template <class T>
__device__ __forceinline__ float front(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
__device__ __forceinline__ float back(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}
__device__ __forceinline__ uint32_t swapped(uint32_t pair) { return pair >> 16 | pair << 16; }

#ifdef INFLECTION_EMULATION

// Two floats in one word, a in front, rounded to nearest, ties to even.
template <class T>
inline uint32_t pack(float a, float b) {
  T both[2];
  put(both, a), put(both + 1, b);
  return both[0].bits | uint32_t{both[1].bits} << 16;
}
// Elementwise maximum of two pairs; NaN if either element is NaN.
template <class T>
inline uint32_t larger(uint32_t a, uint32_t b) {
  return emulator::max_nan_pair(a, b, [](uint16_t bits) { return to_float(T{bits}); });
}
// Elementwise minimum; the other element if one is NaN.
template <class T>
inline uint32_t smaller(uint32_t a, uint32_t b) {
  return emulator::min_pair(a, b, [](uint16_t bits) { return to_float(T{bits}); });
}
// 0xffff where two float16 are equal: NaN equals nothing, -0 equals +0.
inline uint32_t equal(uint32_t a, uint32_t b) {
  return emulator::equal_pair(a, b, [](uint16_t bits) { return to_float(F16{bits}); });
}

#else

// An instruction of two operands that has a name for each of the two formats.
#define IF_PAIR(name, Operand, constraint, before, after)                                                          \
  template <class T>                                                                                               \
  __device__ __forceinline__ uint32_t name(Operand a, Operand b) {                                                 \
    uint32_t pair;                                                                                                 \
    if constexpr (std::is_same_v<T, BF16>) asm(before "bf16x2" after : "=r"(pair) : constraint(a), constraint(b)); \
    else asm(before "f16x2" after : "=r"(pair) : constraint(a), constraint(b));                                    \
    return pair;                                                                                                   \
  }
IF_PAIR(pack, float, "f", "cvt.rn.", ".f32 %0, %2, %1;")
IF_PAIR(larger, uint32_t, "r", "max.NaN.", " %0, %1, %2;")
IF_PAIR(smaller, uint32_t, "r", "min.", " %0, %1, %2;")
#undef IF_PAIR
__device__ __forceinline__ uint32_t equal(uint32_t a, uint32_t b) {
  uint32_t mask;
  asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
  return mask;
}

#endif

}  // namespace inflection
