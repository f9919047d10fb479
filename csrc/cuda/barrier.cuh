// Barriers in shared memory that count threads and bytes (mbarrier), and reallocation of registers between warps: one
// function per instruction, with a second version for the emulator. sm_90.
//
// The first phase of a barrier has parity 0. A phase ends when the expected number of threads and of bytes have arrived;
// the next one expects the same number of threads. wait(b, p) returns when the phase of parity p has ended, so it returns
// at once if the current phase has the other parity: a wait for parity 1 at a new barrier does not wait.
#pragma once

#include "mma.cuh"

namespace inflection {

struct Barrier {
  uint64_t bits;
};

#ifdef INFLECTION_EMULATION

inline void init(Barrier& barrier, unsigned threads) { emulator::mbarrier_init(&barrier.bits, threads); }
inline void publish_barriers() {}
inline void arrive(Barrier& barrier) { emulator::mbarrier_arrive(&barrier.bits, 0); }
inline void arrive_and_expect(Barrier& barrier, unsigned bytes) { emulator::mbarrier_arrive(&barrier.bits, bytes); }
inline void wait(Barrier& barrier, unsigned parity) {
  emulator::mbarrier_wait(&barrier.bits, parity, EMULATOR_PLACE("mbarrier"));
}
template <int kRegisters>
inline void release_registers() {}
template <int kRegisters>
inline void claim_registers() {}

#else

__device__ __forceinline__ void init(Barrier& barrier, unsigned threads) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(threads) : "memory");
}
// Makes barriers that this thread has initialised visible to the copy units; other threads need __syncthreads, too.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
__device__ __forceinline__ void arrive_and_expect(Barrier& barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wait(Barrier& barrier, unsigned parity) {
  unsigned over = 0;
  while (!over) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(over)
                 : "r"(shared_address(&barrier)), "r"(parity)
                 : "memory");
  }
}
// Set the number of registers per thread of a warp group: released, or claimed from those that others released.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace inflection
