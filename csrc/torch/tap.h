// The flag and the slot of a tap.
#pragma once

#include "dispatch.h"
#include "taps.h"

namespace inflection {

inline const int32_t* flag_of(const Tensor& flag, const Tensor& like) {
  STD_TORCH_CHECK(flag.is_cuda() == like.is_cuda() && flag.get_device() == like.get_device(),
                  "flag: is on another device than the measured tensor");
  STD_TORCH_CHECK(flag.scalar_type() == ScalarType::Int && flag.numel() == 1, "flag: expected one int32");
  return data<const int32_t>(flag);
}

// Whether the CPU can skip the call. A GPU kernel reads the flag itself, so that a captured graph reads it at each replay.
inline bool is_down([[maybe_unused]] const int32_t* flag) {
#ifdef INFLECTION_CPU_KERNELS
  return *flag == 0;
#else
  return false;
#endif
}

inline double* slot_of(Tensor& slots, const Tensor& like, int64_t slot, int64_t dims, int64_t sums) {
  STD_TORCH_CHECK(slots.is_cuda() == like.is_cuda() && slots.get_device() == like.get_device(),
                  "slots: are on another device than the measured tensor");
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Double && slots.is_contiguous() && slots.dim() == dims &&
                      slots.size(1) == sums,
                  "slots: expected contiguous float64 of ", dims, " dimensions, ", sums, " sums a slot");
  STD_TORCH_CHECK(slot >= 0 && slot < slots.size(0), "slot: ", slot, " is outside [0, ", slots.size(0), ")");
  return data<double>(slots) + slot * slots.stride(0);
}

}  // namespace inflection
