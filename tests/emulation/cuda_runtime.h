// Stands in for CUDA's header of this name when kernels are compiled as C++ for the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

#define threadIdx (::emulator::thread().index)
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

#define EMULATOR_PLACE(name) ::emulator::Place { name, __FILE__, __LINE__ }
#define __syncthreads() ::emulator::barrier(EMULATOR_PLACE("__syncthreads"))
#define __syncwarp(...) ::emulator::sync_warp(EMULATOR_PLACE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_xor_sync(mask, value, lanes) ::emulator::shuffle(mask, value, [](int lane, int by) { return lane ^ by; }, lanes, EMULATOR_PLACE("__shfl_xor_sync"))
#define __shfl_down_sync(mask, value, lanes) ::emulator::shuffle(mask, value, [](int lane, int by) { return lane + by < 32 ? lane + by : lane; }, lanes, EMULATOR_PLACE("__shfl_down_sync"))
#define __shfl_up_sync(mask, value, lanes) ::emulator::shuffle(mask, value, [](int lane, int by) { return lane >= by ? lane - by : lane; }, lanes, EMULATOR_PLACE("__shfl_up_sync"))
#define __shfl_sync(mask, value, from) ::emulator::shuffle(mask, value, [](int, int by) { return by & 31; }, from, EMULATOR_PLACE("__shfl_sync"))
#define __ballot_sync(mask, predicate) ::emulator::ballot(mask, predicate, EMULATOR_PLACE("__ballot_sync"))
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
  warp_operation(
      mask, &payload, sizeof payload,
      [](void* const* payloads, unsigned mask, const void*) {
        T values[kWarp];
        for (int lane = 0; lane < kWarp; ++lane)
          if (mask >> lane & 1) values[lane] = static_cast<Payload*>(payloads[lane])->value;
        for (int lane = 0; lane < kWarp; ++lane) {
          if (!(mask >> lane & 1)) continue;
          auto& mine = *static_cast<Payload*>(payloads[lane]);
          if (!(mask >> mine.from & 1)) fail("%s (%s:%d): lane %d reads lane %d outside the mask %08x", at.what, at.file, at.line, lane, mine.from, mask);
          mine.value = values[mine.from];
        }
      },
      nullptr, place);
  return payload.value;
}

inline unsigned ballot(unsigned mask, bool predicate, const Place& place) {
  unsigned payload = predicate;
  warp_operation(
      mask, &payload, sizeof payload,
      [](void* const* payloads, unsigned mask, const void*) {
        unsigned votes = 0;
        for (int lane = 0; lane < kWarp; ++lane)
          if (mask >> lane & 1) votes |= *static_cast<unsigned*>(payloads[lane]) << lane;
        for (int lane = 0; lane < kWarp; ++lane)
          if (mask >> lane & 1) *static_cast<unsigned*>(payloads[lane]) = votes;
      },
      nullptr, place);
  return payload;
}

// ex2.approx.ftz.f32, as far off as the PTX manual allows: 2^-22 of the value, up or down by the bits of x; exact at 0.
inline float exp2_approx(float x) {
  if (x == 0.f || x != x) return x == x ? 1.f : x;
  const unsigned mixed = __builtin_bit_cast(unsigned, x) * 2654435761u;
  const float y = static_cast<float>(std::exp2(double(x)) * (1.0 + (mixed >> 31 ? 0x1p-22 : -0x1p-22)));
  return y < 0x1p-126f ? 0.f : y;
}

}  // namespace emulator

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
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
T __ldg(const T* address) { return *address; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
