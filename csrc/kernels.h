// The border between tensors and kernels: every argument struct and every launcher.
//
// Launchers take raw pointers and strides in elements, write only where an output pointer says, never allocate, never
// synchronise and never throw. A `_cpu` launcher (all of them in the list at the end) does the items [begin, end) of its
// work: the caller owns the threads. A `_cuda` launcher enqueues everything on `stream` and returns a cudaError_t as int.
#pragma once

#include <cstdint>

namespace inflection {

enum class DType : int32_t { f32, bf16, f16, boolean };

constexpr int kMaxDims = 8;  // dimensions in front of the rows of an operand
// ---- sum_of_squares -------------------------------------------------------------------------------------------------

// One tensor, its dimensions sorted by stride and merged where they are contiguous: the innermost is dimension 0.
struct Operand {
  const void* data;
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int64_t numel;
  int32_t dims;
  DType dtype;
  int32_t group;
};

constexpr int64_t kSquaresChunk = 1 << 14;  // elements of one work item: small against a core's share

struct SumOfSquaresArgs {
  const Operand* operands;     // [count]
  const int64_t* first_chunk;  // [count + 1], running number of kSquaresChunk-sized work items; the last is their total
  int64_t count, groups;
  const float* inv_scale;  // the sums are multiplied by its square; null: by 1
  const int32_t* flag;     // of a tap: 0 there, and `partial` is not written; null: it is
  double* partial;         // [chunks], scratch: one sum per work item, whatever the threads
  double* totals;          // [groups], scratch of the GPU
  // outputs
  double* out;  // [groups]: the square of a float is no float
};
int sum_of_squares_cuda(const SumOfSquaresArgs&, void* stream);
int sum_of_squares_merge_cuda(const SumOfSquaresArgs&, void* stream);

// ---- attention_stats: statistics of softmax rows, from logits -------------------------------------------------------

// Additive or boolean mask, broadcast by strides of 0. `data` null: no mask.
struct Mask {
  const void* data;
  int64_t strides[kMaxDims];  // one per batch dimension of the operand
  int64_t row_stride;
  int64_t col_stride;
  float floor;  // additive: values at or below are -inf (half of the dtype's lowest finite number)
  DType dtype;  // boolean: true attends
};

// What every row of a softmax can report; a null pointer is not wanted. All [batch * rows], row-major.
struct RowOutputs {
  float* entropy;    // nats
  float* lse;        // log-sum-exp of the scores; -inf without keys
  float* lse_low;    // what it lost when it was rounded; from Q and K only
  float* max_logit;  // largest attendable score; -inf without keys
  float* keys;       // attendable keys
  float* collision;  // sum of squared probabilities
  float* sink;       // probability of key 0, of the first key of a packed row's sequence, or of the sink column if any
};

// The GPU cuts rows that are few and long: blocks take the statistics of parts, warps the gradient of slices. Where
// depends on the shape alone, so that no result depends on the device.
struct RowPart {
  double below, dot;
  float max, square;
  int32_t tops, keys;
};
constexpr int64_t kMultiprocessors = 132;                                // of a large device
constexpr int kResidentBlocks = 2;                                       // that each has registers for, at least
constexpr int64_t kFillBlocks = kMultiprocessors * kResidentBlocks * 2;  // blocks that it runs at once, twice over
constexpr int64_t kFillWarps = kMultiprocessors * 64;                    // warps that it runs at once
constexpr int64_t kLeastPart = 8192;                                     // columns that are worth a block
constexpr int64_t kLeastSlice = 1024;                                    // columns that are worth a warp
constexpr int64_t row_cuts(int64_t rows, int64_t cols, int64_t fill, int64_t least) {
  const int64_t wanted = rows > 0 ? (fill + rows - 1) / rows : 1, most = cols / least;
  const int64_t cuts = wanted < most ? wanted : most;
  return cuts > 1 ? cuts : 1;
}
constexpr int64_t row_parts(int64_t rows, int64_t cols) { return row_cuts(rows, cols, kFillBlocks, kLeastPart); }
constexpr int64_t row_slices(int64_t rows, int64_t cols) { return row_cuts(rows, cols, kFillWarps, kLeastSlice); }

struct AttentionStatsArgs {
  const void* logits;       // [batch..., rows, cols]
  int64_t sizes[kMaxDims];  // batch dimensions, outermost first
  int64_t strides[kMaxDims];
  int64_t batch, rows, cols, row_stride, col_stride;
  int32_t dims;
  DType dtype;
  float floor;   // logits at or below are -inf: masks added beforehand
  double scale;  // not rounded to float: 20 nats^2 of variance would make 1e-6 of that
  bool causal;   // row i attends columns j <= i
  Mask mask;
  RowPart* parts;  // [batch * rows, row_parts] scratch of the GPU where row_parts, or backward row_slices, is above 1
  // outputs
  RowOutputs out;
};
int attention_stats_cuda(const AttentionStatsArgs&, void* stream);

// What the gradient of a row with respect to its scores is made of (core/row_gradient.h).
struct RowGradients {
  const float* entropy;  // [batch * rows], saved by the forward pass
  const float* lse;
  const float* lse_low;  // from Q and K only
  const float* collision;
  const float* sink;
  const float* grad_entropy;  // [batch * rows]; null: zero
  const float* grad_lse;
  const float* grad_collision;
  const float* grad_sink;
};

struct AttentionStatsBackwardArgs {
  AttentionStatsArgs forward;
  RowGradients rows;
  float out_scale;  // factor on the result: `scale` for the gradient of the logits, 1 for that of the scores
  // outputs
  void* grad;  // [batch..., rows, cols] contiguous, dtype `grad_dtype`
  DType grad_dtype;
};
int attention_stats_backward_cuda(const AttentionStatsBackwardArgs&, void* stream);

// ---- attention_stats_qk: the same, fused from Q and K ---------------------------------------------------------------

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMostKeys = 0x7fffff00;  // of a row, and queries: they are counted in 32 bits

struct AttentionStatsQkArgs {
  const void* query;  // [B, H, Tq, D], D at most kMaxHeadDim
  const void* key;    // [B, Hkv, Tk, D], H a multiple of Hkv
  int64_t query_strides[4];
  int64_t key_strides[4];
  int64_t batch, heads, kv_heads, queries, keys, head_dim;
  DType dtype;  // of both
  float scale;
  float softcap;         // c > 0: scores become c * tanh(s / c), before the mask; 0: none
  int64_t window_left;   // attends j >= i - window_left; -1: no bound
  int64_t window_right;  // attends j <= i + window_right; -1: no bound
  bool causal;           // top-left aligned: row i attends j <= i
  Mask mask;             // batch dimensions B, H; rows are positions in [0, Tq)
  const float* sinks;    // [H] scores of a virtual column without value, already in softmax units; null: none
  bool has_sinks;        // the backward pass needs no more than this: a sink's own gradient is O(rows)
  const int64_t* rows;   // [num_rows] query positions, NaN outside [0, Tq); null: all of them, num_rows = Tq
  int64_t num_rows;
  // [Tq, 2] the sequence [begin, end) that a position is in, of Tq = Tk packed ones: its row attends no other keys. Any
  // values: nothing outside [0, Tk) is read. Null: one sequence.
  const int64_t* key_bounds;
  // outputs
  RowOutputs out;  // [B, H, num_rows]
};
int attention_stats_qk_cuda(const AttentionStatsQkArgs&, void* stream);

struct AttentionStatsQkBackwardArgs {
  AttentionStatsQkArgs forward;
  RowGradients rows;  // [B, H, num_rows]
  // outputs
  float* grad_query;  // [B, H, num_rows, D] contiguous
  float* grad_key;    // [B, Hkv, Tk, D] contiguous
};
// Two passes, each deterministic for any number of threads: row blocks fill grad_query, blocks of keys fill grad_key.
int attention_stats_qk_grad_query_cuda(const AttentionStatsQkBackwardArgs&, void* stream);
int attention_stats_qk_grad_key_cuda(const AttentionStatsQkBackwardArgs&, void* stream);

// ---- attention_column_mass: what every key receives, given the log-sum-exp of the rows ------------------------------

struct AttentionColumnMassArgs {
  AttentionStatsQkArgs forward;  // its outputs and sinks are not used: a sink is in `lse`
  const float* lse;              // [B, H, num_rows]; a row at -inf counts nothing
  // outputs
  float* mass;     // [B, H, Tk] sum of min(1, e^(s - lse)) over the rows
  float* squares;  // [B, H, Tk] sum of their squares
};
// Every number has one writer, which adds the rows in a fixed order.
int attention_column_mass_cuda(const AttentionColumnMassArgs&, void* stream);

// ---- cka: the sums over rows behind linear CKA ----------------------------------------------------------------------

// With a shift c subtracted from every row, u = x - c_x, v = y - c_y, p = |u|^2, q = |v|^2, everything that biased and
// debiased CKA need is the Gram matrix of z = (1, p, q, u, v): one symmetric matrix of K = 3 + Dx + Dy rows per layer.
constexpr int64_t kCkaHead = 3;  // 1, p, q

// Upper triangle, row by row: element (i, j), j >= i, is number cka_row(k, i) + j.
constexpr int64_t cka_packed(int64_t k) { return k * (k + 1) / 2; }
constexpr int64_t cka_row(int64_t k, int64_t i) {
  return i * k - i * (i - 1) / 2 - i;
}  // element (i, 0) would be there

constexpr int64_t kCkaDepth = 256;      // rows of a block: float32 sums no longer; 16 columns of it fill half of L1
constexpr int64_t kCkaRowChunk = 16;    // rows of a packing item: their columns of a panel are whole cache lines
constexpr int64_t kCkaBlockRows = 192;  // rows of the Gram matrix in one product item, packed 192 KiB: a share of L2
constexpr int64_t kCkaBlockCols = 256;  // columns of one product item
constexpr int64_t kCkaPanel = 96;       // packed widths are padded to a multiple of every tile's rows and columns
constexpr int64_t kCkaSides = 2;        // shift items of a layer
constexpr int64_t kCkaGpuPanel = 128;   // columns of one side that make up one edge of a tile on the GPU
constexpr int64_t kCkaTermRows = 64;    // rows of the Gram matrix in one item of the terms
constexpr int64_t kCkaTermSums = 6;     // squares of S_xy, S_xx, S_yy; then s_x M_xy s_y, s_x M_xx s_x, s_y M_yy s_y
constexpr int64_t kCkaLeastRows = 4;    // that the debiased terms need

struct CkaSide {
  const void* data;
  const int64_t* offsets;  // [layers] elements from `data` to the first row of a layer
  int64_t dim, row_stride, col_stride;
  DType dtype;
};

struct CkaPushArgs {
  CkaSide x, y;      // [layers, rows, dim]
  const bool* mask;  // [layers, rows], true counts; null: every row does
  int64_t mask_layer_stride, mask_row_stride;
  int64_t layers, rows;
  bool adopt;          // a layer without rows yet takes as shift the mean of the first kCkaDepth rows that count
  const double* seen;  // [layers] rows so far, seen_stride apart; read if `adopt`
  int64_t seen_stride;
  int64_t first;  // CPU: the block in work begins at this one of the rows that count
  // scratch of the CPU
  int64_t* kept;          // [layers, rows] indices of the rows that count
  int64_t* counts;        // [layers]
  float* chunks;          // [layers, kCkaDepth, padded K] shifted rows
  float* left;            // [layers, padded K, kCkaDepth] in panels of kTileRows columns
  float* right;           // [layers, padded K, kCkaDepth] in panels of kTileCols columns
  double* norms;          // [layers, kCkaDepth, 2] p, q
  int64_t* exact;         // [layers, kCkaDepth] rows of the block that are multiplied in float64
  int64_t* exact_counts;  // [layers]
  // scratch of the GPU
  bool fresh;               // no layer has rows yet, whatever `gram` and `seen` hold
  double* row_norms;        // [layers, rows, 2] p, q
  uint8_t* row_kinds;       // [layers, rows] whether and how a row is multiplied
  int32_t* block_exact;     // [layers, ceil(rows / kCkaDepth)] rows of a block that are multiplied in float64
  double* float_rows;       // [layers] rows that are not
  double* column_sums;      // [layers, Dx + Dy] of u over those
  uint16_t* column_shifts;  // [layers, cka_gpu_columns] what 16-bit products subtract, in the dtype of the rows
  // outputs
  float* shift;  // [layers, Dx + Dy]
  double* gram;  // [layers, cka_packed(K)], added to
};
int cka_push_cuda(const CkaPushArgs&, void* stream);
int cka_adopt_cuda(const CkaPushArgs&, void* stream);  // the shifts alone: rows, seen and shift are used

// Rows in a frozen basis, and what tells how much of their variance it keeps; on the GPU torch's products do this.
struct CkaProjectArgs {
  CkaSide sides[kCkaSides];  // [layers, rows, dim]
  const bool* mask;          // [layers, rows], true counts; null: every row does
  int64_t mask_layer_stride, mask_row_stride;
  int64_t layers, rows;
  const float* shift;  // [layers, 2 dim]
  const float* basis;  // [layers, dim, rank]
  int64_t rank, basis_layer_stride, basis_row_stride, basis_col_stride;
  // outputs
  float* out[kCkaSides];  // [layers, rows, rank] (x - c) P; rows that do not count are 0
  double* sums;           // [layers, 2 dim + 2] u, v, |u|^2, |v|^2, added to
};
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t cka_gpu_panels(int64_t dx, int64_t dy) {
  return ceil_div(dx, kCkaGpuPanel) + ceil_div(dy, kCkaGpuPanel);
}
constexpr int64_t cka_gpu_columns(int64_t dx, int64_t dy) { return cka_gpu_panels(dx, dy) * kCkaGpuPanel; }
constexpr int64_t cka_product_items(int64_t k) { return ceil_div(k, kCkaBlockRows) * ceil_div(k, kCkaBlockCols); }
constexpr int64_t cka_term_items(int64_t dx, int64_t dy) { return ceil_div(dx + dy, kCkaTermRows); }

// Numerator and both self terms of CKA: squared Frobenius norms of the centred products, or n (n - 3) HSIC_1.
struct CkaTermsArgs {
  const double* gram;  // [layers, cka_packed(3 + dim_x + dim_y)]
  int64_t layers, dim_x, dim_y;
  bool debiased;
  double* partial;  // [layers, cka_term_items, kCkaTermSums], scratch
  // outputs
  double* terms;  // [layers, 3]: xy, xx, yy; a self term that rounding could have made is 0
};
int cka_terms_cuda(const CkaTermsArgs&, void* stream);
int cka_terms_merge_cuda(const CkaTermsArgs&, void* stream);

// ---- cka_batches: minibatch CKA of layers with layers ---------------------------------------------------------------

constexpr int64_t kCkaBatchDepth = 128;  // features in work at a time: of 256 rows they are 128 KiB, a share of L2
constexpr int64_t kCkaPairRows = 3;      // layers in one item of the inner products
// Of the largest tiles: columns, and what tiles take beside a triangle of n rows and columns, n times half of this.
constexpr int64_t kCkaTriangleColumns = 32, kCkaTriangleEdge = 52;

// Floats that hold the strictly upper triangle over so many rows as tiles of any instruction set.
constexpr int64_t cka_triangle_floats(int64_t rows) {
  const int64_t n = ceil_div(rows, kCkaTriangleColumns) * kCkaTriangleColumns;
  return n * (n + kCkaTriangleEdge) / 2;
}
// Floats of the features in work of so many rows, in whole tiles of any instruction set; and with one for each row.
constexpr int64_t cka_batch_features(int64_t rows) { return ceil_div(rows, kCkaPanel) * kCkaPanel * kCkaBatchDepth; }
constexpr int64_t cka_batch_floats(int64_t rows) { return cka_batch_features(rows) + rows; }

// A batch is `tile` rows, the last one what is left. K is the Gram matrix over the rows of a batch less their mean,
// without its diagonal.
struct CkaBatchArgs {
  CkaSide sides[kCkaSides];   // [layers, rows, dim]
  int64_t layers[kCkaSides];  // 0 of the second: the first with itself
  int64_t rows, tile;
  const float* factors;  // [layers of both sides] powers of two that rows less their mean are multiplied by; null: 1
  int64_t first;         // number of the first batch in work
  float* block;          // [cka_batch_floats(tile)], scratch of one thread
  float* triangles;      // [batches in work, layers of both sides, cka_triangle_floats(tile)], scratch
  // outputs
  double* sums;   // [layers of both sides, rows] of the rows of K
  double* own;    // [batches, layers of both sides] |K|^2
  double* cross;  // [batches, layers, layers of the other side] <K, L>
};

// ---- activation_moments: one pass over what a block takes in and gives out ------------------------------------------

// Sums over the rows that count, in this order; every one of them adds up over batches and ranks.
enum MomentSum : int32_t {
  kMomentRows,      // rows that count
  kMomentElements,  // their elements
  kMomentFirst,     // sum of y, and of its powers
  kMomentSecond,
  kMomentThird,
  kMomentFourth,
  kMomentMassive,  // massive activations
  kMomentInput,    // sum of x^2
  kMomentPairs,    // rows with |x| > 0
  kMomentRatio,    // sum of |y - x| / |x| over those
  kMomentCosines,  // rows with |x| > 0 and |y| > 0
  kMomentCosine,   // sum of x.y / (|x| |y|) over those
  kMomentSums
};

// An activation is massive above both, the second in units of the median magnitude of its row (arXiv 2402.17762).
constexpr double kMassiveMagnitude = 100.0, kMassiveOfMedian = 1000.0;
constexpr int64_t kMomentParts = 8192;  // most work items: warps that a large device runs at once

constexpr int64_t moment_part_rows(int64_t rows) {
  return rows > kMomentParts ? (rows + kMomentParts - 1) / kMomentParts : 1;
}
constexpr int64_t moment_parts(int64_t rows) { return (rows + moment_part_rows(rows) - 1) / moment_part_rows(rows); }

struct MomentRows {  // [batch..., dim], broadcast by strides of 0
  const void* data;
  int64_t strides[kMaxDims];  // of the batch dimensions, outermost first
  int64_t col_stride;
  DType dtype;
};

struct ActivationMomentsArgs {
  MomentRows y, x, mask;  // `data` null: no x, no mask; the mask is boolean, true counts, and has no columns
  int64_t sizes[kMaxDims];
  int32_t dims;
  int64_t rows, dim;
  int64_t part_rows, parts;  // moment_part_rows(rows), moment_parts(rows)
  double* partial;           // [kMomentSums, parts], scratch
  float* partial_largest;    // [parts], scratch
  // outputs
  double* sums;    // [kMomentSums]
  float* largest;  // [1] largest magnitude of y
};
int activation_moments_cuda(const ActivationMomentsArgs&, void* stream);
int activation_moments_merge_cuda(const ActivationMomentsArgs&, void* stream);

// ---- every CPU kernel -----------------------------------------------------------------------------------------------

// X(name, arguments), and what the work items are. The launchers name_cpu, their dispatch by instruction set and the
// tables of kernels follow from this list alone.
#define INFLECTION_KERNEL_LIST(X)                                                                                   \
  X(sum_of_squares, SumOfSquaresArgs)                            /* chunks; fills `partial` */                      \
  X(sum_of_squares_merge, SumOfSquaresArgs)                      /* groups; fills `out` */                          \
  X(activation_moments, ActivationMomentsArgs)                   /* moment_parts(rows) */                           \
  X(activation_moments_merge, ActivationMomentsArgs)             /* kMomentSums + 1 */                              \
  X(attention_stats, AttentionStatsArgs)                         /* batch * rows */                                 \
  X(attention_stats_backward, AttentionStatsBackwardArgs)        /* batch * rows */                                 \
  X(attention_stats_qk, AttentionStatsQkArgs)                    /* its _items */                                   \
  X(attention_stats_qk_grad_query, AttentionStatsQkBackwardArgs) /* its _items */                                   \
  X(attention_stats_qk_grad_key, AttentionStatsQkBackwardArgs)   /* its _items */                                   \
  X(attention_column_mass, AttentionColumnMassArgs)              /* its _items */                                   \
  X(cka_rows, CkaPushArgs)                                       /* layers: the rows that count */                  \
  X(cka_shift, CkaPushArgs)                                      /* layers * kCkaSides; then, by kCkaDepth rows: */ \
  X(cka_pack, CkaPushArgs)                                       /* layers * kCkaDepth / kCkaRowChunk */            \
  X(cka_long_rows, CkaPushArgs)                                  /* layers */                                       \
  X(cka_product, CkaPushArgs)                                    /* layers * cka_product_items */                   \
  X(cka_project, CkaProjectArgs)                                 /* layers * kCkaSides */                           \
  X(cka_batch_triangles, CkaBatchArgs)                           /* batches in work * layers of both sides */       \
  X(cka_batch_products, CkaBatchArgs) /* batches in work * ceil_div(layers, kCkaPairRows) */                        \
  X(cka_terms, CkaTermsArgs)          /* layers * cka_term_items */                                                 \
  X(cka_terms_merge, CkaTermsArgs)    /* layers */
// Those whose number of work items the instruction set decides: name_items(arguments).
#define INFLECTION_ITEMS_LIST(X)                                 \
  X(attention_stats_qk, AttentionStatsQkArgs)                    \
  X(attention_stats_qk_grad_query, AttentionStatsQkBackwardArgs) \
  X(attention_stats_qk_grad_key, AttentionStatsQkBackwardArgs)   \
  X(attention_column_mass, AttentionColumnMassArgs)

#define INFLECTION_DECLARE(name, Args) void name##_cpu(const Args&, int64_t begin, int64_t end);
INFLECTION_KERNEL_LIST(INFLECTION_DECLARE)
#define INFLECTION_DECLARE_ITEMS(name, Args) int64_t name##_items(const Args&);
INFLECTION_ITEMS_LIST(INFLECTION_DECLARE_ITEMS)

enum class Isa : int32_t { portable, avx2, avx512 };
// The best instruction set that this CPU has and this library was built with, at most `limit`; it is the one used from
// then on. Negative `limit`: change nothing. Returns the one in use.
int cpu_isa(int64_t limit);

}  // namespace inflection
