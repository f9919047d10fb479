// Stands in for CUDA's header of this name when kernels are compiled as C++ for the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "hopper.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__ __restrict

#define threadIdx (::emulator::thread().index)
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define EMULATOR_PLACE(name) \
  ::emulator::Place { name, __FILE__, __LINE__ }
#define __syncthreads() ::emulator::barrier(EMULATOR_PLACE("__syncthreads"))
#define __syncthreads_or(predicate) ::emulator::barrier_or(predicate, EMULATOR_PLACE("__syncthreads_or"))
#define __syncwarp(...) ::emulator::sync_warp(EMULATOR_PLACE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_xor_sync(mask, value, lanes) \
  ::emulator::shuffle(mask, value, [](int lane, int by) { return lane ^ by; }, lanes, EMULATOR_PLACE("__shfl_xor_sync"))
#define __shfl_down_sync(mask, value, lanes)                                                                  \
  ::emulator::shuffle(mask, value, [](int lane, int by) { return lane + by < 32 ? lane + by : lane; }, lanes, \
                      EMULATOR_PLACE("__shfl_down_sync"))
#define __shfl_up_sync(mask, value, lanes)                                                                \
  ::emulator::shuffle(mask, value, [](int lane, int by) { return lane >= by ? lane - by : lane; }, lanes, \
                      EMULATOR_PLACE("__shfl_up_sync"))
#define __shfl_sync(mask, value, from) \
  ::emulator::shuffle(mask, value, [](int, int by) { return by & 31; }, from, EMULATOR_PLACE("__shfl_sync"))
#define __ballot_sync(mask, predicate) ::emulator::ballot(mask, predicate, EMULATOR_PLACE("__ballot_sync"))
#define __reduce_min_sync(mask, value) \
  ::emulator::reduce(mask, value, [](int a, int b) { return a < b ? a : b; }, EMULATOR_PLACE("__reduce_min_sync"))
#define __reduce_max_sync(mask, value) \
  ::emulator::reduce(mask, value, [](int a, int b) { return a > b ? a : b; }, EMULATOR_PLACE("__reduce_max_sync"))
#define __any_sync(mask, predicate) (::emulator::ballot(mask, predicate, EMULATOR_PLACE("__any_sync")) != 0)
#define __all_sync(mask, predicate) (::emulator::ballot(mask, predicate, EMULATOR_PLACE("__all_sync")) == (mask))

namespace emulator {

inline void sync_warp(const Place& place, unsigned mask = 0xffffffffu) {
  char nothing = 0;
  warp_operation(mask, &nothing, 0, [](void* const*, unsigned, const void*) {}, nullptr, place);
}

// Each lane asks for the value of another one; asking a lane outside the mask is undefined in CUDA and an error here.
template <class T, class Source>
T shuffle(unsigned mask, T value, Source source, int by, const Place& place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  struct Payload {
    T value;
    int from;
  } payload{value, source(thread().linear % kWarp, by)};
  static thread_local Place at;
  at = place;
  warp_operation(mask, &payload, sizeof payload, [](void* const* payloads, unsigned mask, const void*) {
    T values[kWarp];
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) values[lane] = static_cast<Payload*>(payloads[lane])->value;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      auto& mine = *static_cast<Payload*>(payloads[lane]);
      if (!(mask >> mine.from & 1))
        fail("%s (%s:%d): lane %d reads lane %d outside the mask %08x", at.what, at.file, at.line, lane, mine.from,
             mask);
      mine.value = values[mine.from];
    }
  }, nullptr, place);
  return payload.value;
}

inline unsigned ballot(unsigned mask, bool predicate, const Place& place) {
  unsigned payload = predicate;
  warp_operation(mask, &payload, sizeof payload, [](void* const* payloads, unsigned mask, const void*) {
    unsigned votes = 0;
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) votes |= *static_cast<unsigned*>(payloads[lane]) << lane;
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) *static_cast<unsigned*>(payloads[lane]) = votes;
  }, nullptr, place);
  return payload;
}

template <class Choose>
int reduce(unsigned mask, int value, Choose, const Place& place) {
  warp_operation(mask, &value, sizeof value, [](void* const* payloads, unsigned mask, const void*) {
    int total = *static_cast<int*>(payloads[__builtin_ctz(mask)]);
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) total = Choose{}(total, *static_cast<int*>(payloads[lane]));
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) *static_cast<int*>(payloads[lane]) = total;
  }, nullptr, place);
  return value;
}

// mma m16n8k16.
template <class Widen>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen, const Place& place) {
  struct Payload {
    float c[4];
    uint32_t a[4], b[2];
  } payload{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  warp_operation(0xffffffffu, &payload, sizeof payload, [](void* const* payloads, unsigned, const void*) {
    const auto half = [](uint32_t word, int which) { return Widen{}(static_cast<uint16_t>(word >> 16 * which)); };
    float left[16][16], right[8][16];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& mine = *static_cast<Payload*>(payloads[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e) left[g + i % 2 * 8][2 * t + e + i / 2 * 8] = half(mine.a[i], e);
      for (int i = 0; i < 2; ++i)
        for (int e = 0; e < 2; ++e) right[g][2 * t + e + i * 8] = half(mine.b[i], e);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      auto& mine = *static_cast<Payload*>(payloads[lane]);
      for (int i = 0; i < 4; ++i)
        mine.c[i] = sum_of_products(mine.c[i], left[lane / 4 + i / 2 * 8], right[2 * (lane % 4) + i % 2]);
    }
  }, nullptr, place);
  for (int i = 0; i < 4; ++i) c[i] = payload.c[i];
}

inline void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed, const Place& place) {
  struct Payload {
    const void* row;
    uint32_t r[4];
    bool transposed;
  } payload{row, {}, transposed};
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fail("%s (%s:%d): a row is not aligned to 16 bytes", place.what, place.file, place.line);
  warp_operation(0xffffffffu, &payload, sizeof payload, [](void* const* payloads, unsigned, const void*) {
    const auto element = [&](int matrix, int row, int col) {
      return uint32_t{static_cast<const uint16_t*>(static_cast<Payload*>(payloads[matrix * 8 + row])->row)[col]};
    };
    for (int lane = 0; lane < kWarp; ++lane) {
      auto& mine = *static_cast<Payload*>(payloads[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        mine.r[i] = mine.transposed ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                                    : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
      }
    }
  }, nullptr, place);
  for (int i = 0; i < 4; ++i) r[i] = payload.r[i];
}

// ex2.approx.ftz.f32, as far off as the PTX manual allows: 2^-22 of the value, up or down by the bits of x; exact at 0.
inline float exp2_approx(float x) {
  if (x == 0.f || x != x) return x == x ? 1.f : x;
  const unsigned mixed = __builtin_bit_cast(unsigned, x) * 2654435761u;
  const float y = static_cast<float>(std::exp2(double(x)) * (1.0 + (mixed >> 31 ? 0x1p-22 : -0x1p-22)));
  return y < 0x1p-126f ? 0.f : y;
}

// Exact: the exponent is rescaled by 2^112, which also makes subnormals right; infinities and NaNs are put back.
inline float float_of_f16(uint16_t bits) {
  const float magnitude = __builtin_bit_cast(float, unsigned(bits & 0x7fff) << 13) * 0x1p112f;
  const unsigned special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return __builtin_bit_cast(float, __builtin_bit_cast(unsigned, magnitude) | special | unsigned(bits & 0x8000) << 16);
}

// cvt.rn: to the nearest, ties to even; every NaN becomes 0x7fff.
inline uint16_t bf16_of_float(float x) {
  const unsigned bits = __builtin_bit_cast(unsigned, x);
  return x == x ? static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16) : 0x7fff;
}
inline uint16_t f16_of_float(float x) {
  const unsigned bits = __builtin_bit_cast(unsigned, x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (x != x) return 0x7fff;
  unsigned half = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  if (magnitude < 0x38800000u)  // subnormal
    half = __builtin_bit_cast(unsigned, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  if (magnitude >= 0x477ff000u) half = 0x7c00u;
  return static_cast<uint16_t>(half | sign);
}

// The same for both 16-bit numbers of two words.
template <class Choose>
uint32_t for_both(uint32_t a, uint32_t b, Choose choose) {
  const uint16_t front = choose(static_cast<uint16_t>(a), static_cast<uint16_t>(b));
  return front | uint32_t{choose(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16))} << 16;
}
constexpr uint16_t kCanonicalNan = 0x7fff;

// max.NaN.f16x2, max.NaN.bf16x2: the canonical NaN where one of the two is NaN; +0 is larger than -0.
template <class Widen>
uint32_t max_nan_pair(uint32_t a, uint32_t b, Widen widen) {
  return for_both(a, b, [widen](uint16_t a, uint16_t b) {
    const float x = widen(a), y = widen(b);
    return x != x || y != y ? kCanonicalNan : x > y || (x == y && b >> 15) ? a : b;
  });
}

// min.f16x2, min.bf16x2: the other one where one of the two is NaN; -0 is smaller than +0.
template <class Widen>
uint32_t min_pair(uint32_t a, uint32_t b, Widen widen) {
  return for_both(a, b, [widen](uint16_t a, uint16_t b) {
    const float x = widen(a), y = widen(b);
    if (x != x) return y != y ? kCanonicalNan : b;
    return y != y || x < y || (x == y && a >> 15) ? a : b;
  });
}

// set.eq.u32.f16x2
template <class Widen>
uint32_t equal_pair(uint32_t a, uint32_t b, Widen widen) {
  return for_both(a, b, [widen](uint16_t a, uint16_t b) -> uint16_t { return widen(a) == widen(b) ? 0xffff : 0; });
}

}  // namespace emulator

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = old < value ? old : value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old > value ? old : value;
  return old;
}
inline void __threadfence() {}
template <class T>
T __ldg(const T* address) {
  return *address;
}
inline void __stcg(uint4* address, uint4 value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof value) emulator::fail("a store of 16 bytes is not aligned");
  *address = value;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
