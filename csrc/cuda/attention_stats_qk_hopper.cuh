// The variant of attention_stats_qk for Hopper GPUs, and the conditions of its use.
#pragma once

#include "qk_tiles.cuh"

namespace inflection {

enum class HopperUse { off, on, split, unknown };

// The environment variable INFLECTION_HOPPER. Not set, empty or "0": the default kernel; "1": this one if it supports the
// arguments; "split": the same, with a quarter of its exponentials as polynomials.
HopperUse hopper_use();

// Whether it supports these arguments on this device: 16-bit rows of 64 or 128 numbers that can be copied 16 bytes at a
// time, no mask, no softcap. Bounds, packed sequences, sinks, chosen rows and grouped queries are supported.
bool hopper_takes(const AttentionStatsQkArgs& args);

int attention_stats_qk_hopper_cuda(const AttentionStatsQkArgs& args, bool split, void* stream);

}  // namespace inflection
