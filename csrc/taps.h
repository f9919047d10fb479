// The interface between tensors and kernels, continued: taps, which measure inside a graph if a flag in memory is set.
//
// Launchers as in kernels.h. A flag is one int32. If it is 0, only the flag is read, and only scratch is written.
#pragma once

#include "kernels.h"

namespace inflection {

struct TapRowsArgs {
  const double* draws;  // [num_rows] in [0, 1); null: all positions are rows
  int64_t queries, num_rows;
  const int32_t* flag;
  // outputs
  int64_t* rows;  // [num_rows] one position of each of num_rows strata of [0, queries); -1 if the flag is 0
};
void tap_rows_cpu(const TapRowsArgs&, int64_t begin, int64_t end);  // work items: rows
int tap_rows_cuda(const TapRowsArgs&, void* stream);

constexpr int64_t kTapSums = 9;  // calls; rows, entropy, collision, sink; dy^2, dy dv, dv^2; largest logit

struct TapAttentionArgs {
  RowOutputs stats;  // [B, H, num_rows], read: entropy, max_logit, keys, collision, sink
  int64_t batch, heads, num_rows, queries;
  const int64_t* positions;  // [num_rows] of the rows; null: 0, 1, 2, ...
  const bool* tokens;        // [B, Tq]; null: all are
  int64_t token_strides[2];
  const int32_t* flag;
  // outputs
  double* sums;   // [kTapSums, pitch], the first H of each; increments calls, replaces the others
  int64_t pitch;  // elements from one sum to the next
};
void tap_attention_cpu(const TapAttentionArgs&, int64_t begin, int64_t end);  // work items: heads
int tap_attention_cuda(const TapAttentionArgs&, void* stream);

constexpr int64_t kTapGradientSums = 2;  // arrivals, squares

struct TapGradientArgs {
  const double* partial;  // [chunks] results of sum_of_squares for a gradient
  int64_t chunks;
  const int32_t* flag;
  // outputs
  double* sums;  // [kTapGradientSums], both added to
};
void tap_gradient_cpu(const TapGradientArgs&, int64_t begin, int64_t end);  // one work item
int tap_gradient_cuda(const TapGradientArgs&, void* stream);

}  // namespace inflection
