// Statistics of softmax rows fused from Q and K, for Hopper GPUs (sm_90a). Off by default, because it has not run on a GPU
// yet.
//
// A persistent block of three warp groups processes several tiles of 128 query rows; the heads of a group are packed
// together as in attention_stats_qk.cu. One warp of the first group is the producer: it copies tiles of 128 keys into a
// ring buffer in shared memory, one instruction per 64 numbers of the depth, as far ahead as the ring has room, also across
// tiles of rows. Each of the other two groups is a consumer of 64 rows: it keeps the queries in registers and holds two
// tiles of scores, so that the product of the next keys runs during the exponentials of the last ones. Only the ring
// synchronises the two consumers (reason: docs/kernels.md). Lane states and formulas are those of the default kernel.
//
// Registers per thread: 128 for two tiles of 64 x 128 scores, 32 for queries of D = 128; the producer group releases its
// registers to the consumers. Shared memory, D = 128: four tiles of keys, 128 KiB.
#include "attention_stats_qk_hopper.cuh"

#include <stdlib.h>
#include <string.h>

#include "qk_lane.cuh"
#include "wgmma.cuh"

// Other architectures lack these instructions; for them the kernel is a trap. A Hopper GPU reaches it only if the library
// was compiled without sm_90a.
#if defined(INFLECTION_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define IF_HOPPER 1
#endif

namespace inflection {
namespace {

constexpr int kGroups = 2;  // consumer groups
constexpr int kBlockRows = kGroups * kGroupRows, kBlockThreads = (1 + kGroups) * kGroupThreads;
constexpr int kTileKeys = kProductCols;
constexpr int kPanelDepth = kSwizzledRow / 2;  // numbers per row of a box
constexpr int kStages = 4;                     // of the ring
constexpr int kSplitPolynomials = 4;           // of 16 exponentials
constexpr int kCopyRegisters = 40, kComputeRegisters = 232;
static_assert(kGroupThreads * (kCopyRegisters + kGroups * kComputeRegisters) <= 65536);

template <class T, int kDepth>
struct Ring {
  static constexpr int kPanels = kDepth / kPanelDepth;
  static constexpr unsigned kTileBytes = kTileKeys * kDepth * sizeof(T);

  alignas(kSwizzleAlign) T keys[kStages][kPanels][kTileKeys][kPanelDepth];
  Barrier full[kStages];   // the tile has arrived
  Barrier empty[kStages];  // all consumer warps have released it
};

// A stage of the ring, and the parity of its current round.
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The tile of rows of this block in a round. Every second round is in reverse order, so that a block with longer rows of a
// causal mask gets shorter ones next.
__device__ __forceinline__ int64_t tile_of_round(int64_t round) {
  return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Bounds of the keys that a set of existing rows attends.
struct KeySpan {
  int lowest, highest;           // union of the rows' bounds; highest <= lowest: empty
  int highest_low, lowest_high;  // intersection of the rows' bounds

  // The same in all lanes, and in all warps that call it.
  static __device__ __forceinline__ KeySpan of(const AttentionStatsQkArgs& args, const QkForm& form,
                                               const HeadPlace& head, int64_t first) {
    const int keys = static_cast<int>(args.keys);
    KeySpan span{keys, 0, 0, keys};
#pragma unroll 1
    for (int r = threadIdx.x % kWarpSize; r < kGroupRows; r += kWarpSize) {
      const RowPlace row = RowPlace::of(args, form, head, first + r);
      if (!row.inside) continue;
      const bool any = row.high > row.low;
      span.join({any ? row.low : keys, any ? row.high : 0, row.low, row.high});
    }
    // Not by shuffles: the compiler must see that all lanes have the same bounds. Otherwise it assumes that lanes leave the
    // loop over keys separately, and waits for each product at once.
    return {__reduce_min_sync(kAllLanes, span.lowest), __reduce_max_sync(kAllLanes, span.highest),
            __reduce_max_sync(kAllLanes, span.highest_low), __reduce_min_sync(kAllLanes, span.lowest_high)};
  }
  __device__ __forceinline__ void join(const KeySpan& other) {
    lowest = lowest < other.lowest ? lowest : other.lowest;
    highest = highest > other.highest ? highest : other.highest;
    highest_low = highest_low > other.highest_low ? highest_low : other.highest_low;
    lowest_high = lowest_high < other.lowest_high ? lowest_high : other.lowest_high;
  }
  __device__ __forceinline__ int first_key() const { return lowest / kTileKeys * kTileKeys; }
  // Every row attends every key of the tile.
  __device__ __forceinline__ bool cover(int key) const { return highest_low <= key && key + kTileKeys <= lowest_high; }
};

// The two rows of a lane, g and g + 8 of its warp.
struct LaneRows {
  QkLane state[2];
  int low[2], high[2], sink_key[2];
  int attended[2] = {};
  float sink[2] = {-kInf, -kInf};  // score of the key that `sink` reports, in the lane that has it

  // Adds a tile of scores. `whole`: both rows attend all of it, and its products are the scores.
  template <bool kAll, int kPolynomials>
  __device__ __forceinline__ void push(const float (&c)[kProductFloats], const QkForm& form, int key, bool whole,
                                       bool has_sink) {
    constexpr int kPerRow = kProductFloats / 2;
    const int first = key + static_cast<int>(threadIdx.x) % kLanesPerRow * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float score[kPerRow];
#pragma unroll
      for (int i = 0; i < kPerRow; ++i) score[i] = c[i / 2 * 4 + h * 2 + i % 2];
      if (whole) {
        attended[h] += kPerRow;
      } else {
#pragma unroll
        for (int i = 0; i < kPerRow; ++i) {
          const int at = first + i / 2 * 8 + i % 2;
          const bool attends = at >= low[h] && at < high[h];
          score[i] = attends ? score[i] * form.factor : -kInf;
          attended[h] += attends;
        }
      }
      if (has_sink) {
#pragma unroll
        for (int i = 0; i < kPerRow; ++i) sink[h] = sink_key[h] == first + i / 2 * 8 + i % 2 ? score[i] : sink[h];
      }
      state[h].template push<kAll, kPolynomials, true>(score, form.exponent);
    }
  }
};

// Loads the queries of a lane's row as an operand of the products; 0 for a row that does not exist.
template <class T, int kDepth>
__device__ __forceinline__ void load_queries_of(uint32_t (&q)[kDepth / kProductDepth][4],
                                                const AttentionStatsQkArgs& args, const HeadPlace& head,
                                                const RowPlace& row, int h) {
  const int64_t position = row.inside ? row.position : 0;
  const T* queries = static_cast<const T*>(args.query) + head.batch * args.query_strides[0] +
                     row.head * args.query_strides[1] + position * args.query_strides[2];
  const auto* pairs = reinterpret_cast<const uint32_t*>(queries) + threadIdx.x % kLanesPerRow;
#pragma unroll
  for (int k = 0; k < kDepth / kProductDepth; ++k) {
    q[k][h] = row.inside ? pairs[k * 8] : 0;
    q[k][h + 2] = row.inside ? pairs[k * 8 + 4] : 0;
  }
}

// Starts the product of a tile of keys; `c` must not be used until the wait.
template <class T, int kDepth>
__device__ __forceinline__ void begin_product(float (&c)[kProductFloats],
                                              const uint32_t (&q)[kDepth / kProductDepth][4],
                                              const T (&keys)[kDepth / kPanelDepth][kTileKeys][kPanelDepth]) {
  __syncwarp();
  const uint64_t matrix = swizzled_matrix(shared_address(keys));
  constexpr int kSteps = kPanelDepth / kProductDepth, kPanelBytes = kTileKeys * kSwizzledRow;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth / kProductDepth; ++k) {
    const int bytes = k / kSteps * kPanelBytes + k % kSteps * kProductDepth * 2;
    if (k == 0) wgmma<T, false>(c, q[k], matrix);
    else wgmma<T, true>(c, q[k], matrix + (bytes >> 4));
  }
  wgmma_commit();
}

template <class T, int kDepth, bool kAll, int kPolynomials>
__global__ void __launch_bounds__(kBlockThreads, 1)
    stats_of_tiles(AttentionStatsQkArgs args, QkForm form, const __grid_constant__ TensorMap keys_of_tensor,
                   int64_t row_tiles, int64_t tiles) {
#ifdef IF_HOPPER
  using Memory = Ring<T, kDepth>;
  Memory& ring = shared<Memory>();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init(ring.full[stage], 1);
      init(ring.empty[stage], kGroups * kGroupThreads / kWarpSize);
    }
    publish_barriers();
  }
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0) - 1;
  const int lane = threadIdx.x % kWarpSize;
  RingPlace next;  // the next tile of keys to copy or to multiply
  const auto place = [&](int64_t tile, HeadPlace& head) {
    head = HeadPlace::of(args, form, tile / row_tiles);
    return (row_tiles - 1 - tile % row_tiles) * kBlockRows;  // under a causal mask the longest first
  };

  if (group < 0) {
    release_registers<kCopyRegisters>();
    if (threadIdx.x >= kWarpSize) return;
    for (int64_t round = 0, tile; (tile = tile_of_round(round)) < tiles; ++round) {
      HeadPlace head;
      const int64_t first_row = place(tile, head);
      KeySpan span = KeySpan::of(args, form, head, first_row);
      span.join(KeySpan::of(args, form, head, first_row + kGroupRows));
      if (lane != 0) continue;
      for (int key = span.first_key(); key < span.highest; key += kTileKeys, next.advance()) {
        wait(ring.empty[next.stage], next.parity ^ 1);
        arrive_and_expect(ring.full[next.stage], Memory::kTileBytes);
        for (int panel = 0; panel < Memory::kPanels; ++panel) {
          copy_box(ring.keys[next.stage][panel], keys_of_tensor, panel * kPanelDepth, key,
                   static_cast<int>(head.kv_head), static_cast<int>(head.batch), ring.full[next.stage]);
        }
      }
    }
    return;
  }

  claim_registers<kComputeRegisters>();
  const int first_of_warp = static_cast<int>(threadIdx.x) % kGroupThreads / kWarpSize * 16;
  RingPlace last;  // the oldest tile that this warp has not released
  const auto release = [&] {
    if (lane == 0) arrive(ring.empty[last.stage]);
    last.advance();
  };
  float even[kProductFloats], odd[kProductFloats];
  uint32_t q[kDepth / kProductDepth][4];
  for (int64_t round = 0, tile; (tile = tile_of_round(round)) < tiles; ++round) {
    HeadPlace head;
    const int64_t first_row = place(tile, head) + group * kGroupRows;
    const KeySpan span = KeySpan::of(args, form, head, first_row);
    KeySpan both = span;
    both.join(KeySpan::of(args, form, head, first_row + (group == 0 ? kGroupRows : -kGroupRows)));

    LaneRows rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowPlace row = RowPlace::of(args, form, head, first_row + first_of_warp + h * 8 + lane / kLanesPerRow);
      rows.low[h] = row.low, rows.high[h] = row.high, rows.sink_key[h] = row.sink;
      load_queries_of<T, kDepth>(q, args, head, row, h);
    }
    const auto skip_to = [&](int key, int end) {  // tiles that only the other group needs
      for (; key < end; key += kTileKeys, next.advance()) {
        wait(ring.full[next.stage], next.parity);  // otherwise its round could count this warp twice
        release();
      }
    };
    const auto begin = [&](float (&c)[kProductFloats]) {
      wait(ring.full[next.stage], next.parity);
      begin_product<T, kDepth>(c, q, ring.keys[next.stage]);
      next.advance();
    };
    const auto add = [&](float (&c)[kProductFloats], int key) {
      keep(c);
      release();
      rows.template push<kAll, kPolynomials>(c, form, key, form.plain && span.cover(key),
                                             key == 0 || args.key_bounds != nullptr);
    };

    const bool any = span.lowest < span.highest;
    const int first_key = any ? span.first_key() : both.first_key();
    skip_to(both.first_key(), first_key);
    int key = first_key;
    if (any) {
      // One product runs while the scores of another are read. The number of running products must be the same on all
      // paths through the loop; otherwise the compiler waits for each product at once.
      begin(even);
      for (; key + 2 * kTileKeys < span.highest; key += 2 * kTileKeys) {
        begin(odd);
        wgmma_wait<1>();
        add(even, key);
        begin(even);
        wgmma_wait<1>();
        add(odd, key + kTileKeys);
      }
      const bool two = key + kTileKeys < span.highest;
      if (two) {
        begin(odd);
        wgmma_wait<1>();
        add(even, key);
        wgmma_wait<0>();
        add(odd, key + kTileKeys);
      } else {
        wgmma_wait<0>();
        add(even, key);
      }
      key += two ? 2 * kTileKeys : kTileKeys;
    }
    skip_to(key, both.highest);

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowPlace row = RowPlace::of(args, form, head, first_row + first_of_warp + h * 8 + lane / kLanesPerRow);
      write_row(args, form, row, rows.state[h], rows.attended[h], rows.sink[h]);
    }
  }
#else
  __trap();
#endif
}

template <class T, int kDepth, bool kAll, int kPolynomials>
int run(const AttentionStatsQkArgs& args, void* stream) {
  const QkForm form = QkForm::of(args);
  const int64_t row_tiles = ceil_div(args.num_rows * form.group, kBlockRows);
  const int64_t tiles = args.batch * args.kv_heads * row_tiles;
  const int64_t blocks = tiles < multiprocessors() ? tiles : multiprocessors();
  const auto bytes = [&](int d) { return static_cast<uint64_t>(args.key_strides[d]) * sizeof(T); };
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  const TensorShape shape{args.key,
                          {kDepth, size(args.keys), size(args.kv_heads), size(args.batch)},
                          {bytes(2), bytes(1), bytes(0)},
                          {kPanelDepth, kTileKeys, 1, 1}};
  TensorMap map;
  if (const int error = describe(shape, map); error != cudaSuccess) return error;
  return launch(stats_of_tiles<T, kDepth, kAll, kPolynomials>, dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads),
                sizeof(Ring<T, kDepth>), stream, args, form, map, row_tiles, tiles);
}

template <class T, int kDepth>
int run(const AttentionStatsQkArgs& args, bool split, void* stream) {
  if (split) {
    return args.out.collision ? run<T, kDepth, true, kSplitPolynomials>(args, stream)
                              : run<T, kDepth, false, kSplitPolynomials>(args, stream);
  }
  return args.out.collision ? run<T, kDepth, true, 0>(args, stream) : run<T, kDepth, false, 0>(args, stream);
}

}  // namespace

HopperUse hopper_use() {
  const char* const value = getenv("INFLECTION_HOPPER");
  if (value == nullptr || *value == '\0' || strcmp(value, "0") == 0) return HopperUse::off;
  return strcmp(value, "1") == 0 ? HopperUse::on : strcmp(value, "split") == 0 ? HopperUse::split : HopperUse::unknown;
}

bool hopper_takes(const AttentionStatsQkArgs& args) {
  const bool shape = args.dtype != DType::f32 && (args.head_dim == 64 || args.head_dim == 128) && args.batch > 0 &&
                     args.heads > 0 && args.num_rows > 0 && args.keys > 0;
  if (!shape || args.mask.data != nullptr || args.softcap != 0.f || !QkForm::of(args).vector) return false;
  const int64_t sizes[] = {args.batch, args.kv_heads, args.keys};
  for (int d = 0; d < 3; ++d) {
    const int64_t stride = args.key_strides[d] * 2;
    if (stride < 0 || stride >= static_cast<int64_t>(kMostStride) || (stride == 0 && sizes[d] > 1)) return false;
  }
  return is_hopper();
}

int attention_stats_qk_hopper_cuda(const AttentionStatsQkArgs& args, bool split, void* stream) {
  return for_dtype(args.dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2)
      return args.head_dim == 64 ? run<T, 64>(args, split, stream) : run<T, 128>(args, split, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace inflection
