// See hopper.h.
#include "hopper.h"

#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

namespace emulator {
namespace {

constexpr uint64_t kSwizzledRow = 128, kSwizzleAlign = 1024;

uint64_t swizzled(uint64_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// ---- barriers -------------------------------------------------------------------------------------------------------

// In the 64 bits of shared memory that are theirs. Bytes may arrive before they are announced: counted from the middle.
constexpr unsigned kMost = (1 << 20) - 1;  // threads; bytes under way

struct Barrier {
  unsigned waiting_for : 20, threads : 20;
  unsigned bytes : 21;  // under way, + kMost
  unsigned parity : 1, valid : 2;
};

Barrier load(const uint64_t* at) {
  shared_offset(at);
  const uint64_t bits = *at;
  const auto field = [bits](int first, int count) {
    return static_cast<unsigned>(bits >> first & ((1u << count) - 1));
  };
  const Barrier barrier{field(0, 20), field(20, 20), field(40, 21), field(61, 1), field(62, 2)};
  if (barrier.valid != 1) fail("an mbarrier is not initialised");
  return barrier;
}

// The phase ends with the last thread and the last byte.
void store(uint64_t* at, Barrier barrier) {
  if (barrier.waiting_for == 0 && barrier.bytes == kMost) {
    barrier.waiting_for = barrier.threads;
    barrier.parity ^= 1;
  }
  *at = barrier.waiting_for | uint64_t{barrier.threads} << 20 | uint64_t{barrier.bytes} << 40 |
        uint64_t{barrier.parity} << 61 | uint64_t{barrier.valid} << 62;
}

unsigned count_bytes(unsigned bytes, int64_t more) {
  const int64_t total = bytes + more;
  if (total < 0 || total > 2 * int64_t{kMost}) fail("an mbarrier counts more bytes than it can");
  return static_cast<unsigned>(total);
}

// ---- products -------------------------------------------------------------------------------------------------------

constexpr int kGroupWarps = 4;

struct Product {  // the quarter of one warp
  float* c[kWarp];
  const uint32_t* a[kWarp];
  uint64_t b;
  int cols;
  bool add;
  Widen widen;
};

struct Warp {
  std::deque<std::vector<Product>> groups{1};  // committed ones, then the open one
  long issued = 0;
  bool fenced = false;
};

std::map<int, Warp>& warps() {
  static std::map<int, Warp> all;
  return all;
}

long products = 0;

Warp& warp_of_thread() { return warps()[thread().linear / kWarp]; }

uint16_t element_of(uint64_t b, int col, int k) {
  const uint64_t first = (b & 0x3fff) << 4, eight_rows = (b >> 32 & 0x3fff) << 4;
  uint16_t bits;
  const uint64_t at = swizzled(first + col / 8 * eight_rows + col % 8 * kSwizzledRow + k * sizeof bits);
  const auto* memory = static_cast<const unsigned char*>(shared_memory());
  shared_offset(memory + at);
  memcpy(&bits, memory + at, sizeof bits);
  return bits;
}

void carry_out(const Product& product) {
  float left[16][16];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 8; ++i)
      left[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
          product.widen(static_cast<uint16_t>(product.a[lane][i / 2] >> 16 * (i % 2)));
  for (int col = 0; col < product.cols; ++col) {
    float right[16];
    for (int k = 0; k < 16; ++k) right[k] = product.widen(element_of(product.b, col, k));
    for (int row = 0; row < 16; ++row) {
      float& c = product.c[row % 8 * 4 + col % 8 / 2][col / 8 * 4 + row / 8 * 2 + col % 2];
      c = sum_of_products(product.add ? c : 0.f, left[row], right);
    }
  }
}

// body(warp) once, when all lanes have come.
template <class Body>
void once_a_warp(const Body& body, const Place& place) {
  char nothing = 0;
  warp_operation(0xffffffffu, &nothing, 0, [](void* const*, unsigned, const void* argument) {
    (*static_cast<const Body*>(argument))(warp_of_thread());
  }, &body, place);
}

}  // namespace

float sum_of_products(float c, const float (&a)[16], const float (&b)[16]) {
  double sum = c;
  for (int k = 0; k < 16; ++k) sum += double(a[k]) * b[k];
  const float near = static_cast<float>(sum);
  return std::fabs(double(near)) > std::fabs(sum) && !std::isinf(near) ? std::nextafter(near, 0.f) : near;
}

void mbarrier_init(uint64_t* barrier, unsigned threads) {
  if (threads == 0 || threads > kMost) fail("an mbarrier for %u threads", threads);
  shared_offset(barrier);
  store(barrier, {threads, threads, kMost, 0, 1});
}

void mbarrier_arrive(uint64_t* at, unsigned expected_bytes) {
  Barrier barrier = load(at);
  if (barrier.waiting_for == 0) fail("more threads arrive at an mbarrier than it was made for");
  barrier.bytes = count_bytes(barrier.bytes, expected_bytes);
  --barrier.waiting_for;
  store(at, barrier);
}

void mbarrier_wait(uint64_t* at, unsigned parity, const Place& place) {
  struct Wanted {
    const uint64_t* at;
    unsigned parity;
  } wanted{at, parity & 1};
  load(at);
  wait_until([](const void* argument) {
    const auto& wanted = *static_cast<const Wanted*>(argument);
    return load(wanted.at).parity != wanted.parity;
  }, &wanted, place);
}

int describe_tensor(TensorMap& map, const void* data, int dims, const uint64_t* sizes, const uint64_t* strides,
                    const uint32_t* box) {
  map = {static_cast<const unsigned char*>(data), dims, {}, {}, {}};
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || dims < 3 || dims > kMostTensorDims) return 1;
  for (int d = 0; d < dims; ++d) {
    map.sizes[d] = sizes[d], map.box[d] = box[d];
    map.strides[d] = d == 0 ? sizeof(uint16_t) : strides[d - 1];
    if (sizes[d] == 0 || sizes[d] > uint64_t{1} << 32 || box[d] == 0 || box[d] > 256) return 1;
    if (d > 0 && (map.strides[d] % 16 != 0 || map.strides[d] >= uint64_t{1} << 40)) return 1;
  }
  return box[0] * sizeof(uint16_t) == kSwizzledRow ? 0 : 1;
}

void copy_box(void* to, const TensorMap& map, const std::array<int, 4>& first, uint64_t* barrier) {
  if (map.dims != 4) fail("a box of 4 dimensions of a tensor of %d", map.dims);
  const uint64_t offset = shared_offset(to), rows = uint64_t{map.box[1]} * map.box[2] * map.box[3];
  if (offset % kSwizzleAlign) fail("a box that is swizzled begins at %zu, not at a multiple of 1024", size_t(offset));
  shared_offset(static_cast<unsigned char*>(to) + rows * kSwizzledRow - 1);
  load(barrier);
  happens_later([=] {
    auto* memory = static_cast<unsigned char*>(shared_memory());
    for (uint64_t row = 0; row < rows; ++row) {
      const int64_t in_row[] = {0, int64_t(row % map.box[1]), int64_t(row / map.box[1] % map.box[2]),
                                int64_t(row / map.box[1] / map.box[2])};
      const unsigned char* from = map.data;
      bool inside = true;
      for (int d = 1; d < 4; ++d) {
        const int64_t at = first[d] + in_row[d];
        inside = inside && at >= 0 && at < int64_t(map.sizes[d]);
        if (inside) from += at * int64_t(map.strides[d]);
      }
      for (int64_t i = 0; i < map.box[0]; ++i) {
        const int64_t at = first[0] + i;
        uint16_t number = 0;
        if (inside && at >= 0 && at < int64_t(map.sizes[0])) memcpy(&number, from + at * 2, 2);
        memcpy(memory + swizzled(offset + row * kSwizzledRow + i * 2), &number, 2);
      }
    }
    Barrier now = load(barrier);
    now.bytes = count_bytes(now.bytes, -int64_t(rows * kSwizzledRow));
    store(barrier, now);
  });
}

void wgmma_fence(const Place& place) {
  once_a_warp([](Warp& warp) { warp.fenced = true; }, place);
}

void wgmma_commit(const Place& place) {
  once_a_warp([](Warp& warp) { warp.groups.emplace_back(); }, place);
}

void wgmma_wait(size_t pending, const Place& place) {
  once_a_warp([pending](Warp& warp) {
    while (warp.groups.size() > pending + 1) {
      for (const Product& product : warp.groups.front()) carry_out(product);
      warp.groups.pop_front();
    }
    warp.fenced = false;
  }, place);
}

void wgmma(float* c, int cols, const uint32_t* a, uint64_t b, bool add, Widen widen, const Place& place) {
  if (b >> 62 != 1 || (b >> 49 & 7) != 0) fail("wgmma: only matrices swizzled by 128 bytes, from where that begins");
  if ((b << 4 & (kSwizzleAlign - kSwizzledRow)) != 0) fail("wgmma: a matrix begins inside of a pattern");
  struct Payload {
    float* c;
    const uint32_t* a;
    uint64_t b;
    int cols;
    bool add;
    Widen widen;
  } payload{c, a, b, cols, add, widen};
  warp_operation(0xffffffffu, &payload, sizeof payload, [](void* const* payloads, unsigned, const void*) {
    Warp& warp = warp_of_thread();
    const auto& of_first = *static_cast<Payload*>(payloads[0]);
    Product product{{}, {}, of_first.b, of_first.cols, of_first.add, of_first.widen};
    if (!warp.fenced) fail("wgmma without a fence since registers were last in use");
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& mine = *static_cast<Payload*>(payloads[lane]);
      if (mine.b != product.b) fail("wgmma: lane %d describes another matrix", lane);
      product.c[lane] = mine.c, product.a[lane] = mine.a;
      for (int i = 0; !mine.add && i < mine.cols / 2; ++i) mine.c[i] = NAN;
    }
    warp.groups.back().push_back(product);
    ++warp.issued, ++products;
  }, nullptr, place);
}

extern "C" long emulator_products() { return products; }

void block_begins() { warps().clear(); }

void thread_ends() {
  const auto found = warps().find(thread().linear / kWarp);
  if (found == warps().end()) return;
  if (found->second.groups.size() > 1 || !found->second.groups.back().empty())
    fail("thread %d ended before its products were waited for", thread().linear);
}

void block_ends(size_t events) {
  if (events) fail("the block ended before its boxes had arrived");
  for (const auto& [number, warp] : warps()) {
    const auto first = warps().find(number / kGroupWarps * kGroupWarps);
    if (first == warps().end() || first->second.issued != warp.issued)
      fail("warps of one group have issued different numbers of products");
  }
}

}  // namespace emulator
