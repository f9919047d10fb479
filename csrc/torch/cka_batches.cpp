// cka_batches: sums over the Gram matrices of each minibatch, on the CPU; other devices: see ops/cka/matrix.py.
#include <tuple>

#include "cka.h"

namespace inflection {
namespace {

// Batches are processed in groups with a barrier after each. A group has at least kLayersPerThread layers for each
// thread, so that threads end at about the same time, and fills kTriangleBytes, a share of the last-level cache.
constexpr int64_t kLayersPerThread = 16, kTriangleBytes = 2 << 20;

// Number of batches in a group, and the memory of all buffers.
struct BatchPlan {
  BatchPlan(int64_t layers_x, int64_t layers_y, int64_t rows, int64_t most_rows)
      : layers(layers_x + layers_y), across(layers_y > 0 ? layers_y : layers_x), tile(std::min(most_rows, rows)) {
    STD_TORCH_CHECK(layers_x > 0 && layers_y >= 0 && rows > 0 && most_rows > 0,
                    "x, y, tile: expected layers, rows and a tile above 0");
    batches = ceil_div(rows, tile);
    threads = torch::stable::get_num_threads();
    block = cka_batch_floats(tile);
    triangles = layers * cka_triangle_floats(tile);
    group = std::max(ceil_div(kLayersPerThread * threads, layers), kTriangleBytes / (4 * triangles));
    group = std::clamp<int64_t>(group, 1, batches);
    bytes = 4 * (threads * block + group * triangles) + 8 * (batches * (layers_x * across + layers) + layers * rows);
  }

  int64_t layers, across, tile, batches;
  int64_t threads, block;    // block: floats per thread
  int64_t group, triangles;  // triangles: floats per batch of the group
  int64_t bytes;             // of these and of the results
};

std::tuple<Tensor, Tensor, Tensor> cka_batches(Tensor x, MaybeTensor y, int64_t tile, MaybeTensor factors) {
  std::vector<int64_t> offsets[kCkaSides];
  CkaBatchArgs args{};
  args.sides[0] = side_of(x, "x", offsets[0]);
  if (y) args.sides[1] = side_of(*y, "y", offsets[1]);
  STD_TORCH_CHECK(x.dim() == 3 && (!y || (y->dim() == 3 && y->size(1) == x.size(1))),
                  "x, y: expected features [L, N, D] of as many rows");
  const BatchPlan plan(x.size(0), y ? y->size(0) : 0, x.size(1), tile);
  if (factors) args.factors = elements<const float>(*factors, "factors", plan.layers);
  args.layers[0] = x.size(0);
  args.layers[1] = plan.layers - args.layers[0];
  args.rows = x.size(1);
  args.tile = plan.tile;
  Tensor cross = new_double(x, {plan.batches, args.layers[0], plan.across});
  Tensor own = new_double(x, {plan.batches, plan.layers}), sums = new_double(x, {plan.layers, args.rows});
  Tensor blocks = scratch(x, plan.threads * plan.block, ScalarType::Float);
  Tensor triangles = scratch(x, plan.group * plan.triangles, ScalarType::Float);
  args.cross = data<double>(cross);
  args.own = data<double>(own);
  args.sums = data<double>(sums);
  args.triangles = data<float>(triangles);

  const int64_t work = plan.layers * args.rows * plan.tile * std::max(args.sides[0].dim, args.sides[1].dim);
  const int64_t threads = work <= kSerialWork ? 1 : plan.threads;
  for (args.first = 0; args.first < plan.batches; args.first += plan.group) {
    const int64_t now = std::min(plan.group, plan.batches - args.first);
    parallel_items(now * plan.layers, threads, [&](int64_t item, int64_t thread) {
      CkaBatchArgs part = args;
      part.block = data<float>(blocks) + thread * plan.block;
      cka_batch_triangles_cpu(part, item, item + 1);
    });
    parallel_items(now * ceil_div(args.layers[0], kCkaPairRows), threads,
                   [&](int64_t item, int64_t) { cka_batch_products_cpu(args, item, item + 1); });
  }
  return {cross, own, sums};
}

int64_t cka_batches_bytes(int64_t layers_x, int64_t layers_y, int64_t rows, int64_t tile) {
  return BatchPlan(layers_x, layers_y, rows, tile).bytes;
}

}  // namespace

// clang-format off
INFLECTION_SCHEMAS(m) {
  m.def("cka_batches(Tensor x, Tensor? y, int tile, Tensor? factors=None) -> (Tensor cross, Tensor own, Tensor sums)");
  m.def("cka_batches_bytes(int layers_x, int layers_y, int rows, int tile) -> int");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) { m.impl("cka_batches", TORCH_BOX(&cka_batches)); }
STABLE_TORCH_LIBRARY_IMPL(inflection_fast, CompositeExplicitAutograd, m) {
  m.impl("cka_batches_bytes", TORCH_BOX(&cka_batches_bytes));
}

}  // namespace inflection
