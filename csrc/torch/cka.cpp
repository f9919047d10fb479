// Linear CKA. cka_push adds rows to the Gram matrices, cka_adopt sets shifts, cka_gram_terms reads Gram matrices,
// cka_terms does all of it without keeping them, cka_project projects rows on a frozen basis.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cka.h"

namespace inflection {
namespace {

// Memory of the Gram matrices that are not kept: a few layers per thread, or launches that fill a GPU.
constexpr int64_t kGramBytes = kCuda ? 1 << 30 : 64 << 20;

#ifdef INFLECTION_CPU_KERNELS
// Adds the rows of one layer; run(kernel, items) runs a kernel with one thread or several.
template <class Run>
void push_layer(CkaPushArgs& args, const Run& run) {
  const int64_t k = kCkaHead + args.x.dim + args.y.dim;
  cka_rows_cpu(args, 0, 1);
  if (args.adopt) run(&cka_shift_cpu, kCkaSides);
  for (args.first = 0; args.first < args.counts[0]; args.first += kCkaDepth) {
    run(&cka_pack_cpu, kCkaDepth / kCkaRowChunk);
    cka_long_rows_cpu(args, 0, 1);
    run(&cka_product_cpu, cka_product_items(k));
  }
}

// Scratch memory for `slots` layers at a time.
struct PushScratch {
  PushScratch(const CkaPushArgs& args, const Tensor& like, int64_t slots)
      : dims(args.x.dim + args.y.dim),
        padded(ceil_div(kCkaHead + dims, kCkaPanel) * kCkaPanel),
        ints(scratch(like, slots * (args.rows + kCkaDepth + 2), ScalarType::Long)),
        packed(scratch(like, slots * 3 * padded * kCkaDepth, ScalarType::Float)),
        norms(scratch(like, slots * kCkaDepth * 2, ScalarType::Double)) {}

  // The arguments for one layer of `args`.
  CkaPushArgs one(const CkaPushArgs& args, int64_t layer, int64_t slot) const {
    CkaPushArgs part = args;
    part.layers = 1;
    part.x.offsets += layer;
    part.y.offsets += layer;
    if (part.mask != nullptr) part.mask += layer * args.mask_layer_stride;
    part.shift += layer * dims;
    part.seen += layer * args.seen_stride;
    part.counts = data<int64_t>(ints) + slot * (args.rows + kCkaDepth + 2);
    part.exact_counts = part.counts + 1;
    part.exact = part.counts + 2;
    part.kept = part.exact + kCkaDepth;
    part.chunks = data<float>(packed) + slot * 3 * padded * kCkaDepth;
    part.left = part.chunks + padded * kCkaDepth;
    part.right = part.left + padded * kCkaDepth;
    part.norms = data<double>(norms) + slot * kCkaDepth * 2;
    return part;
  }

  int64_t dims, padded;
  Tensor ints, packed, norms;
};

// Adds the rows of all layers to args.gram. Each thread takes whole layers, without barriers, as long as there are enough
// for all threads; the remaining layers are processed by all threads together, one after the other.
void push(const CkaPushArgs& args, const Tensor& like) {
  using Kernel = void (*)(const CkaPushArgs&, int64_t, int64_t);
  const int64_t k = kCkaHead + args.x.dim + args.y.dim;
  const double work = static_cast<double>(args.layers) * args.rows * k * k;  // rows of stride 0 may exceed int64
  const int64_t threads = work <= kSerialWork ? 1 : torch::stable::get_num_threads();
  const int64_t whole = args.layers - args.layers % threads;
  const PushScratch memory(args, like, whole > 0 ? threads : 1);
  const auto one = [&](int64_t layer, int64_t slot) {
    CkaPushArgs part = memory.one(args, layer, slot);
    part.gram += layer * cka_packed(k);
    return part;
  };
  if (whole > 0) {
    parallel_items(whole, threads, [&](int64_t layer, int64_t thread) {
      CkaPushArgs part = one(layer, thread);
      push_layer(part, [&](Kernel kernel, int64_t items) { kernel(part, 0, items); });
    });
  }
  for (int64_t layer = whole; layer < args.layers; ++layer) {
    CkaPushArgs part = one(layer, 0);
    push_layer(part, [&](Kernel kernel, int64_t items) {
      parallel_items(items, std::min(threads, items), [&](int64_t item, int64_t) { kernel(part, item, item + 1); });
    });
  }
}

// Sets the shift of each layer without rows.
void adopt(const CkaPushArgs& args, const Tensor& like) {
  const PushScratch memory(args, like, 1);
  for (int64_t layer = 0; layer < args.layers; ++layer) {
    CkaPushArgs part = memory.one(args, layer, 0);
    if (*part.seen != 0.0) continue;
    cka_rows_cpu(part, 0, 1);
    cka_shift_cpu(part, 0, kCkaSides);
  }
}
#else
void push(CkaPushArgs args, const Tensor& like) {
  const int64_t dims = args.x.dim + args.y.dim, layers = args.layers;
  STD_TORCH_CHECK(args.x.dtype == args.y.dtype, "x and y: expected the same dtype");
  Tensor sums = scratch(like, layers * (args.rows * 2 + 1 + dims), ScalarType::Double);
  Tensor kinds = scratch(like, layers * args.rows, ScalarType::Byte);
  Tensor exact = scratch(like, layers * ceil_div(args.rows, kCkaDepth), ScalarType::Int);
  Tensor shifts = scratch(like, layers * cka_gpu_columns(args.x.dim, args.y.dim), ScalarType::Short);
  args.row_norms = data<double>(sums);
  args.float_rows = args.row_norms + layers * args.rows * 2;
  args.column_sums = args.float_rows + layers;
  args.row_kinds = data<uint8_t>(kinds);
  args.block_exact = data<int32_t>(exact);
  args.column_shifts = data<uint16_t>(shifts);
  INFLECTION_RUN(cka_push, args, like, 0, 0);
}

void adopt(const CkaPushArgs& args, const Tensor& like) { INFLECTION_RUN(cka_adopt, args, like, 0, 0); }
#endif

void read_terms(const CkaTermsArgs& args, const Tensor& on) {
  INFLECTION_RUN(cka_terms, args, on, args.layers * cka_term_items(args.dim_x, args.dim_y), 4);
  INFLECTION_RUN(cka_terms_merge, args, on, args.layers, 64);
}

void check_pair(const Tensor& x, const Tensor& y) {
  bool same = x.dim() == y.dim() && x.get_device() == y.get_device();
  for (int64_t d = 0; same && d + 1 < x.dim(); ++d) same = x.size(d) == y.size(d);
  STD_TORCH_CHECK(same, "x and y: expected the same device and the same sizes but for the last");
}

// A pair of features and their mask as kernel arguments, which point to the offsets.
CkaPushArgs rows_of(const Tensor& x, const Tensor& y, const MaybeTensor& mask, std::vector<int64_t>& x_offsets,
                    std::vector<int64_t>& y_offsets) {
  CkaPushArgs args{};
  args.x = side_of(x, "x", x_offsets);
  args.y = side_of(y, "y", y_offsets);
  check_pair(x, y);
  args.layers = layers_of(x);
  args.rows = x.size(x.dim() - 2);
  if (mask.has_value()) {
    check_device(*mask, "mask");
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == args.layers &&
                        mask->size(1) == args.rows,
                    "mask: expected bool [layers, rows]");
    args.mask = data<const bool>(*mask);
    args.mask_layer_stride = mask->stride(0);
    args.mask_row_stride = mask->stride(1);
  }
  return args;
}

void cka_push(Tensor gram, Tensor shift, Tensor x, Tensor y, MaybeTensor mask, bool adopt) {
  std::vector<int64_t> x_offsets, y_offsets;
  CkaPushArgs args = rows_of(x, y, mask, x_offsets, y_offsets);
  const int64_t packed = cka_packed(kCkaHead + args.x.dim + args.y.dim);
  args.shift = elements<float>(shift, "shift", args.layers * (args.x.dim + args.y.dim));
  args.gram = elements<double>(gram, "gram", args.layers * packed);
  args.adopt = adopt;
  args.seen = args.gram;
  args.seen_stride = packed;
  push(args, x);
}

void cka_adopt(Tensor seen, Tensor shift, Tensor x, Tensor y, MaybeTensor mask) {
  std::vector<int64_t> x_offsets, y_offsets;
  CkaPushArgs args = rows_of(x, y, mask, x_offsets, y_offsets);
  check_device(seen, "seen");
  STD_TORCH_CHECK(seen.scalar_type() == ScalarType::Double && seen.dim() == 1 && seen.numel() == args.layers,
                  "seen: expected float64 [layers]");
  args.shift = elements<float>(shift, "shift", args.layers * (args.x.dim + args.y.dim));
  args.seen = data<const double>(seen);
  args.seen_stride = seen.stride(0);
  if (args.mask == nullptr) args.rows = std::min(args.rows, kCkaDepth);
  adopt(args, x);
}

#ifdef INFLECTION_CPU_KERNELS  // other devices use products of torch, see ops/cka/basis.py
std::tuple<Tensor, Tensor> cka_project(Tensor sums, Tensor x, Tensor y, Tensor shift, Tensor basis, MaybeTensor mask) {
  std::vector<int64_t> x_offsets, y_offsets;
  const CkaPushArgs rows = rows_of(x, y, mask, x_offsets, y_offsets);
  const int64_t dim = rows.x.dim, layers = rows.layers;
  check_device(basis, "basis");

  STD_TORCH_CHECK(basis.scalar_type() == ScalarType::Float && basis.dim() == 3 && basis.size(0) == layers &&
                      basis.size(1) == dim && rows.y.dim == dim,
                  "basis: expected float32 [layers, ", dim, ", rank], x and y as wide");

  const int64_t rank = basis.size(2);
  Tensor on_x = new_float(x, {layers, rows.rows, rank}), on_y = new_float(x, {layers, rows.rows, rank});
  const CkaProjectArgs args{{rows.x, rows.y},
                            rows.mask,
                            rows.mask_layer_stride,
                            rows.mask_row_stride,
                            layers,
                            rows.rows,
                            elements<const float>(shift, "shift", layers * 2 * dim),
                            data<const float>(basis),
                            rank,
                            basis.stride(0),
                            basis.stride(1),
                            basis.stride(2),
                            {data<float>(on_x), data<float>(on_y)},
                            elements<double>(sums, "sums", layers * (2 * dim + 2))};
  const int64_t work = std::max<int64_t>(rows.rows * dim * rank, 1);
  INFLECTION_RUN(cka_project, args, x, layers * kCkaSides, ceil_div(kSerialWork, work));
  return {on_x, on_y};
}
#endif

Tensor new_terms(const Tensor& like, std::vector<int64_t> sizes) {
  sizes.push_back(3);
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Double);
}

Tensor cka_gram_terms(Tensor gram, int64_t dim_x, int64_t dim_y, bool debiased) {
  STD_TORCH_CHECK(gram.dim() == 2 && dim_x >= 0 && dim_y >= 0, "gram: expected [layers, packed] and two widths");
  const int64_t layers = gram.size(0);
  Tensor terms = new_terms(gram, {layers});
  Tensor partial = scratch(gram, layers * cka_term_items(dim_x, dim_y) * kCkaTermSums, ScalarType::Double);
  const double* sums = elements<const double>(gram, "gram", layers * cka_packed(kCkaHead + dim_x + dim_y));
  read_terms({sums, layers, dim_x, dim_y, debiased, data<double>(partial), data<double>(terms)}, gram);
  return terms;
}

Tensor cka_terms(Tensor x, Tensor y, bool debiased) {
  std::vector<int64_t> x_offsets, y_offsets, sizes;
  CkaPushArgs args{};
  args.x = side_of(x, "x", x_offsets);
  args.y = side_of(y, "y", y_offsets);
  check_pair(x, y);
  for (int64_t d = 0; d + 2 < x.dim(); ++d) sizes.push_back(x.size(d));
  args.rows = x.size(x.dim() - 2);
  args.adopt = true;
  args.seen_stride = cka_packed(kCkaHead + args.x.dim + args.y.dim);
  const int64_t dims = args.x.dim + args.y.dim, packed = args.seen_stride, layers = layers_of(x);
  int64_t group = std::clamp<int64_t>(kGramBytes / (packed * 8), 1, std::max<int64_t>(layers, 1));
  const int64_t threads = torch::stable::get_num_threads();
  if (group > threads) group -= group % threads;  // so that each thread takes whole layers
  Tensor terms = new_terms(x, sizes);
  Tensor gram = scratch(x, group * packed, ScalarType::Double), shift = scratch(x, group * dims, ScalarType::Float);
  Tensor partial = scratch(x, group * cka_term_items(args.x.dim, args.y.dim) * kCkaTermSums, ScalarType::Double);
  args.gram = data<double>(gram);
  args.seen = args.gram;
  args.shift = data<float>(shift);
#ifndef INFLECTION_CPU_KERNELS
  args.fresh = args.rows > 0;  // the GPU then neither clears nor reads the matrix
#endif
  for (int64_t layer = 0; layer < layers; layer += group) {
    if (!args.fresh) torch::stable::zero_(gram);
    args.layers = std::min(group, layers - layer);
    args.x.offsets = x_offsets.data() + layer;
    args.y.offsets = y_offsets.data() + layer;
    push(args, x);
    read_terms({args.gram, args.layers, args.x.dim, args.y.dim, debiased, data<double>(partial),
                data<double>(terms) + layer * 3},
               x);
  }
  return terms;
}

}  // namespace

// clang-format off
INFLECTION_SCHEMAS(m) {
  m.def("cka_push(Tensor(a!) gram, Tensor(b!) shift, Tensor x, Tensor y, Tensor? mask, bool adopt) -> ()");
  m.def("cka_adopt(Tensor seen, Tensor(a!) shift, Tensor x, Tensor y, Tensor? mask) -> ()");
  m.def("cka_project(Tensor(a!) sums, Tensor x, Tensor y, Tensor shift, Tensor basis, Tensor? mask) -> (Tensor, Tensor)");
  m.def("cka_gram_terms(Tensor gram, int dim_x, int dim_y, bool debiased) -> Tensor");
  m.def("cka_terms(Tensor x, Tensor y, bool debiased) -> Tensor");
  m.def("cka_terms_backward(Tensor grad, Tensor x, Tensor y, bool debiased) -> (Tensor, Tensor)");
  m.def("cka_scatter(Tensor x, Tensor y) -> Tensor");
  m.def("cka_scatter_backward(Tensor grad, Tensor x, Tensor y) -> (Tensor, Tensor)");
}
// clang-format on

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("cka_push", TORCH_BOX(&cka_push));
  m.impl("cka_adopt", TORCH_BOX(&cka_adopt));
#ifdef INFLECTION_CPU_KERNELS
  m.impl("cka_project", TORCH_BOX(&cka_project));
#endif
  m.impl("cka_gram_terms", TORCH_BOX(&cka_gram_terms));
  m.impl("cka_terms", TORCH_BOX(&cka_terms));
}

}  // namespace inflection
