// The interface between tensors and kernels: all argument structs and all launchers.
//
// Launchers take raw pointers and strides in elements, write only to output pointers and scratch, never allocate, never
// synchronise and never throw. A `_cpu` launcher (listed at the end) does the work items [begin, end); the caller owns the
// threads. A `_cuda` launcher enqueues all work on `stream` and returns a cudaError_t as int.
#pragma once

#include <cstdint>

namespace inflection {

enum class DType : int32_t { f32, bf16, f16, boolean };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kMaxDims = 8;  // batch dimensions of an operand

// ---- sum_of_squares -------------------------------------------------------------------------------------------------

// One tensor. Its dimensions are sorted by stride, the innermost first, and contiguous ones are merged.
struct Operand {
  const void* data;
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int64_t numel;
  int32_t dims;
  DType dtype;
  int32_t group;
};

constexpr int64_t kSquaresChunk = 1 << 14;  // elements of one work item

struct SumOfSquaresArgs {
  const Operand* operands;     // [count]
  const int64_t* first_chunk;  // [count + 1], running number of kSquaresChunk-sized work items; the last is their total
  int64_t count, groups;
  const float* inv_scale;  // the sums are multiplied by its square; null: by 1
  const int32_t* flag;     // of a tap: if it is 0, `partial` is not written; null: no tap
  double* partial;         // [chunks], scratch: one sum per work item
  double* totals;          // [groups], scratch of the GPU
  // outputs
  double* out;  // [groups]
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
  float floor;  // additive: values at or below count as -inf (half of the dtype's lowest finite number)
  DType dtype;  // boolean: true attends
};

// Results of softmax rows, [batch * rows]; null: not requested.
struct RowOutputs {
  float* entropy;    // nats
  float* lse;        // log-sum-exp of the scores; -inf without keys
  float* lse_low;    // its rounding error; from Q and K only
  float* max_logit;  // largest attendable score; -inf without keys
  float* keys;       // attendable keys
  float* collision;  // sum of squared probabilities
  float* sink;       // probability of key 0, of the first key of a packed row's sequence, or of the sink column if any
};

// The GPU splits rows that are few and long: a block computes the statistics of a part, a warp the gradient of a slice.
// The split depends only on the shape, so results do not depend on the device.
struct RowPart {
  double below, dot;
  float max, square;
  int32_t tops, keys;
};
constexpr int64_t kMultiprocessors = 132;                                // of a large device
constexpr int kResidentBlocks = 2;                                       // least number per multiprocessor
constexpr int64_t kFillBlocks = kMultiprocessors * kResidentBlocks * 2;  // two waves of resident blocks
constexpr int64_t kFillWarps = kMultiprocessors * 64;                    // resident warps
constexpr int64_t kLeastPart = 8192;                                     // least number of columns per block
constexpr int64_t kLeastSlice = 1024;                                    // least number of columns per warp
constexpr int64_t row_cuts(int64_t rows, int64_t cols, int64_t fill, int64_t least) {
  const int64_t wanted = rows > 0 ? ceil_div(fill, rows) : 1, most = cols / least;
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
  float floor;   // logits at or below count as -inf, for masks that were added before
  double scale;  // not float: its rounding error times a variance of 20 nats^2 would be 1e-6
  bool causal;   // row i attends columns j <= i
  Mask mask;
  RowPart* parts;  // [batch * rows, row_parts] scratch of the GPU if row_parts, or backward row_slices, is above 1
  // outputs
  RowOutputs out;
};
int attention_stats_cuda(const AttentionStatsArgs&, void* stream);

// Inputs of the gradient of rows with respect to their scores (core/row_gradient.h).
struct RowGradients {
  const float* entropy;  // [batch * rows], results of the forward pass
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
  float out_scale;  // factor of the result: `scale` for the gradient of the logits, 1 for that of the scores
  // outputs
  void* grad;  // [batch..., rows, cols] contiguous, dtype `grad_dtype`
  DType grad_dtype;
};
int attention_stats_backward_cuda(const AttentionStatsBackwardArgs&, void* stream);

// ---- attention_stats_qk: the same, fused from Q and K ---------------------------------------------------------------

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMostKeys = 0x7fffff00;  // keys of a row, and queries: kernels count them in 32 bits

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
  const float* sinks;    // [H] scores of an additional column without value, not scaled; null: none
  bool has_sinks;        // of the backward pass, which needs no scores of sinks: Python computes their gradient
  const int64_t* rows;   // [num_rows] query positions, NaN outside [0, Tq); null: all of them, num_rows = Tq
  int64_t num_rows;
  // [Tq, 2] bounds [begin, end) of each position's sequence, of packed sequences (Tq = Tk): its row attends only these
  // keys. Nothing outside [0, Tk) is read, whatever the values are. Null: one sequence.
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
// Two deterministic passes: one over row blocks writes grad_query, one over blocks of keys writes grad_key.
int attention_stats_qk_grad_query_cuda(const AttentionStatsQkBackwardArgs&, void* stream);
int attention_stats_qk_grad_key_cuda(const AttentionStatsQkBackwardArgs&, void* stream);

// ---- attention_column_mass: column sums of probabilities, given the log-sum-exp of the rows -------------------------

struct AttentionColumnMassArgs {
  AttentionStatsQkArgs forward;  // its outputs and sinks are not used: `lse` includes sinks
  const float* lse;              // [B, H, num_rows]; a row with -inf does not count
  // outputs
  float* mass;     // [B, H, Tk] sum of min(1, e^(s - lse)) over the rows
  float* squares;  // [B, H, Tk] sum of their squares
};
// Each number has one writer, which adds the rows in a fixed order.
int attention_column_mass_cuda(const AttentionColumnMassArgs&, void* stream);

// ---- cka: Gram matrices for linear CKA ------------------------------------------------------------------------------

// With shifts c, u = x - c_x, v = y - c_y, p = |u|^2, q = |v|^2: biased and debiased CKA follow from the Gram matrix of
// z = (1, p, q, u, v) over the rows, one symmetric matrix of K = 3 + Dx + Dy rows per layer.
constexpr int64_t kCkaHead = 3;  // 1, p, q

// Upper triangle, row by row: element (i, j), j >= i, is number cka_row(k, i) + j.
constexpr int64_t cka_packed(int64_t k) { return k * (k + 1) / 2; }
constexpr int64_t cka_row(int64_t k, int64_t i) { return i * k - i * (i - 1) / 2 - i; }

constexpr int64_t kCkaDepth = 256;      // rows of a block: float32 sums are no longer; 16 columns fill half of L1
constexpr int64_t kCkaRowChunk = 16;    // rows of a packing item: their columns of a panel are whole cache lines
constexpr int64_t kCkaBlockRows = 192;  // rows of the Gram matrix in one product item, packed 192 KiB: a share of L2
constexpr int64_t kCkaBlockCols = 256;  // columns of one product item
constexpr int64_t kCkaPanel = 96;       // packed widths are padded to a multiple of the rows and columns of all tiles
constexpr int64_t kCkaSides = 2;        // x and y
constexpr int64_t kCkaGpuPanel = 128;   // columns of one edge of a tile on the GPU
constexpr int64_t kCkaTermRows = 64;    // rows of the Gram matrix in one item of the terms
constexpr int64_t kCkaTermSums = 6;     // squares of S_xy, S_xx, S_yy; then s_x M_xy s_y, s_x M_xx s_x, s_y M_yy s_y
constexpr int64_t kCkaLeastRows = 4;    // for debiased terms

struct CkaSide {
  const void* data;
  const int64_t* offsets;  // [layers] elements from `data` to the first row of a layer
  int64_t dim, row_stride, col_stride;
  DType dtype;
};

struct CkaPushArgs {
  CkaSide x, y;      // [layers, rows, dim]
  const bool* mask;  // [layers, rows], true counts; null: all rows count
  int64_t mask_layer_stride, mask_row_stride;
  int64_t layers, rows;
  bool adopt;          // the shift of a layer without rows becomes the mean of the first kCkaDepth rows that count
  const double* seen;  // [layers] number of rows so far, with stride seen_stride; read if `adopt`
  int64_t seen_stride;
  int64_t first;  // CPU: index of the first row of the block, among the rows that count
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
  bool fresh;               // no layer has rows yet; `gram` and `seen` are not initialised
  double* row_norms;        // [layers, rows, 2] p, q
  uint8_t* row_kinds;       // [layers, rows] whether and how a row is multiplied
  int32_t* block_exact;     // [layers, ceil(rows / kCkaDepth)] number of rows that are multiplied in float64
  double* float_rows;       // [layers] number of rows that are multiplied in float32
  double* column_sums;      // [layers, Dx + Dy] of u over those
  uint16_t* column_shifts;  // [layers, cka_gpu_columns] numbers that 16-bit products subtract, in the dtype of the rows
  // outputs
  float* shift;  // [layers, Dx + Dy]
  double* gram;  // [layers, cka_packed(K)], added to
};
int cka_push_cuda(const CkaPushArgs&, void* stream);
int cka_adopt_cuda(const CkaPushArgs&, void* stream);  // sets the shifts only; uses rows, seen and shift

// Projects rows on a frozen basis, and adds up their variance. CPU only; on the GPU torch multiplies.
struct CkaProjectArgs {
  CkaSide sides[kCkaSides];  // [layers, rows, dim]
  const bool* mask;          // [layers, rows], true counts; null: all rows count
  int64_t mask_layer_stride, mask_row_stride;
  int64_t layers, rows;
  const float* shift;  // [layers, 2 dim]
  const float* basis;  // [layers, dim, rank]
  int64_t rank, basis_layer_stride, basis_row_stride, basis_col_stride;
  // outputs
  float* out[kCkaSides];  // [layers, rows, rank] (x - c) P; rows that do not count are 0
  double* sums;           // [layers, 2 dim + 2] u, v, |u|^2, |v|^2, added to
};
constexpr int64_t cka_gpu_panels(int64_t dx, int64_t dy) {
  return ceil_div(dx, kCkaGpuPanel) + ceil_div(dy, kCkaGpuPanel);
}
constexpr int64_t cka_gpu_columns(int64_t dx, int64_t dy) { return cka_gpu_panels(dx, dy) * kCkaGpuPanel; }
constexpr int64_t cka_product_items(int64_t k) { return ceil_div(k, kCkaBlockRows) * ceil_div(k, kCkaBlockCols); }
constexpr int64_t cka_term_items(int64_t dx, int64_t dy) { return ceil_div(dx + dy, kCkaTermRows); }

// Cross term and self terms of CKA: squared Frobenius norms of the centred products, or n (n - 3) HSIC_1.
struct CkaTermsArgs {
  const double* gram;  // [layers, cka_packed(3 + dim_x + dim_y)]
  int64_t layers, dim_x, dim_y;
  bool debiased;
  double* partial;  // [layers, cka_term_items, kCkaTermSums], scratch
  // outputs
  double* terms;  // [layers, 3]: xy, xx, yy; a self term as small as rounding errors is 0
};
int cka_terms_cuda(const CkaTermsArgs&, void* stream);
int cka_terms_merge_cuda(const CkaTermsArgs&, void* stream);

// ---- cka_batches: minibatch CKA of layers with layers ---------------------------------------------------------------

constexpr int64_t kCkaBatchDepth = 128;  // features processed at a time: 128 KiB for 256 rows, a share of L2
constexpr int64_t kCkaPairRows = 3;      // layers in one item of the inner products
// Columns of the largest tile; and the padding of a triangle of n rows by tiles is at most n kCkaTriangleEdge / 2 floats.
constexpr int64_t kCkaTriangleColumns = 32, kCkaTriangleEdge = 52;

// Floats of the tiles that hold the strictly upper triangle over the rows, for any instruction set.
constexpr int64_t cka_triangle_floats(int64_t rows) {
  const int64_t n = ceil_div(rows, kCkaTriangleColumns) * kCkaTriangleColumns;
  return n * (n + kCkaTriangleEdge) / 2;
}
// Floats of kCkaBatchDepth features of the rows, in whole tiles of any instruction set; and with one more for each row.
constexpr int64_t cka_batch_features(int64_t rows) { return ceil_div(rows, kCkaPanel) * kCkaPanel * kCkaBatchDepth; }
constexpr int64_t cka_batch_floats(int64_t rows) { return cka_batch_features(rows) + rows; }

// A batch has `tile` rows; the last one may have fewer. K is the Gram matrix over the centred rows of a batch, without its
// diagonal.
struct CkaBatchArgs {
  CkaSide sides[kCkaSides];   // [layers, rows, dim]
  int64_t layers[kCkaSides];  // second 0: the first side with itself
  int64_t rows, tile;
  const float* factors;  // [layers of both sides] powers of two that scale the centred rows; null: 1
  int64_t first;         // number of the first batch of the group
  float* block;          // [cka_batch_floats(tile)], scratch of one thread
  float* triangles;      // [batches of the group, layers of both sides, cka_triangle_floats(tile)], scratch
  // outputs
  double* sums;   // [layers of both sides, rows] row sums of K
  double* own;    // [batches, layers of both sides] |K|^2
  double* cross;  // [batches, layers, layers of the other side] <K, L>
};

// ---- activation_moments: one pass over the input and the output of a block ------------------------------------------

// Sums over the rows that count, in this order. Sums of batches and ranks are added.
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

// An activation is massive if it exceeds both; the second is in units of the row's median magnitude (arXiv 2402.17762).
constexpr double kMassiveMagnitude = 100.0, kMassiveOfMedian = 1000.0;
constexpr int64_t kMomentParts = 8192;  // largest number of work items: resident warps of a large device

constexpr int64_t moment_part_rows(int64_t rows) { return rows > kMomentParts ? ceil_div(rows, kMomentParts) : 1; }
constexpr int64_t moment_parts(int64_t rows) { return ceil_div(rows, moment_part_rows(rows)); }

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

// X(name, arguments), with the number of work items. The launchers name_cpu, their dispatch by instruction set and the
// tables of kernels are generated from this list.
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
  X(cka_batch_triangles, CkaBatchArgs)                           /* batches of the group * layers of both sides */  \
  X(cka_batch_products, CkaBatchArgs) /* batches of the group * ceil_div(layers, kCkaPairRows) */                   \
  X(cka_terms, CkaTermsArgs)          /* layers * cka_term_items */                                                 \
  X(cka_terms_merge, CkaTermsArgs)    /* layers */
// Kernels whose number of work items depends on the instruction set: name_items(arguments).
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
// Selects the best instruction set of this CPU and this library, at most `limit`; negative: no change. Returns the one in
// use.
int cpu_isa(int64_t limit);

}  // namespace inflection
