// The variant of attention_stats_qk for Hopper GPUs, and when it is used.
#pragma once

#include "qk_tiles.cuh"

namespace inflection {

enum class HopperUse { off, on, split, unknown };

// What the environment variable INFLECTION_HOPPER asks for: nothing or "0": the usual kernel; "1": this one where it
// takes the arguments; "split": the same, a quarter of its exponentials by multiplying and adding.
HopperUse hopper_use();

// Whether it takes these arguments on this device: 16-bit rows of 64 or 128 numbers that can be copied 16 bytes at a
// time, no mask, no softcap. Bounds, packed sequences, sinks, chosen rows and grouped queries are its own.
bool hopper_takes(const AttentionStatsQkArgs& args);

int attention_stats_qk_hopper_cuda(const AttentionStatsQkArgs& args, bool split, void* stream);

}  // namespace inflection
