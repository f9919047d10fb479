// cka_push, cka_gram_terms, cka_terms: the Gram matrix behind linear CKA, added to, read, or both without keeping it.
#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.h"

namespace inflection {
namespace {

// Layers share the scratch up to this much of Gram matrix when it is not kept: enough that small ones fill the threads.
constexpr int64_t kGroupBytes = 16 << 20;
constexpr int64_t kPackedBytes = 4 << 20;  // packed rows in flight: a share of the last cache

constexpr int64_t kSerialWork = 1 << 20;  // multiplications of a block that one thread does sooner than it wakes another

#ifndef USE_CUDA
// Work items of unequal cost: each thread takes the next one. Which thread does it changes nothing in its result.
template <class Args>
void take_turns(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t items, bool serial) {
  if (serial) return kernel(args, 0, items);
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t item = next++; item < items; item = next++) kernel(args, item, item + 1);
  });
}
#endif

int64_t layers_of(const Tensor& features) {
  int64_t layers = 1;
  for (int64_t d = 0; d + 2 < features.dim(); ++d) layers *= features.size(d);
  return layers;
}

// Where every layer of features [..., N, D] begins; `offsets` keeps what the side points to.
CkaSide side_of(const Tensor& features, const char* name, std::vector<int64_t>& offsets) {
  check_device(features, name);
  STD_TORCH_CHECK(features.dim() >= 2, name, ": expected [..., N, D]");
  const int64_t last = features.dim() - 1;
  for (int64_t layer = 0; layer < layers_of(features); ++layer) {
    int64_t index = layer, offset = 0;
    for (int64_t d = last - 2; d >= 0; --d) {
      offset += index % features.size(d) * features.stride(d);
      index /= features.size(d);
    }
    offsets.push_back(offset);
  }
  const DType dtype = dtype_of(features, name);
  STD_TORCH_CHECK(dtype != DType::boolean, name, ": dtype must be float32, bfloat16 or float16");
  return {features.const_data_ptr(), offsets.data(), features.size(last), features.stride(last - 1), features.stride(last), dtype};
}

Tensor scratch(const Tensor& like, int64_t numel, ScalarType dtype) {
  const int64_t size[] = {std::max<int64_t>(numel, 1)};
  return torch::stable::new_empty(like, {size, 1}, dtype);
}

// Adds the rows of every layer to args.gram, as many layers at a time as the scratch has room for.
void push(CkaPushArgs args, const Tensor& like) {
  const int64_t dims = args.x.dim + args.y.dim, k = kCkaHead + dims, padded = ceil_div(k, kCkaPanel) * kCkaPanel;
  const int64_t per_layer = padded * kCkaDepth * static_cast<int64_t>(sizeof(float));
  const int64_t group = std::clamp<int64_t>(kPackedBytes / (2 * per_layer), 1, std::max<int64_t>(args.layers, 1));
  Tensor kept = scratch(like, group * args.rows, ScalarType::Long), counts = scratch(like, 2 * group, ScalarType::Long);
  Tensor exact = scratch(like, group * kCkaDepth, ScalarType::Long);
  Tensor packed = scratch(like, 3 * group * padded * kCkaDepth, ScalarType::Float);
  Tensor norms = scratch(like, group * kCkaDepth * 2, ScalarType::Double);
  args.kept = static_cast<int64_t*>(kept.data_ptr());
  args.counts = static_cast<int64_t*>(counts.data_ptr());
  args.exact = static_cast<int64_t*>(exact.data_ptr());
  args.exact_counts = args.counts + group;
  args.chunks = static_cast<float*>(packed.data_ptr());
  args.left = args.chunks + group * padded * kCkaDepth;
  args.right = args.left + group * padded * kCkaDepth;
  args.norms = static_cast<double*>(norms.data_ptr());
#ifndef USE_CUDA
  for (int64_t layer = 0; layer < args.layers; layer += group) {
    CkaPushArgs part = args;
    part.layers = std::min(group, args.layers - layer);
    part.x.offsets += layer;
    part.y.offsets += layer;
    if (part.mask != nullptr) part.mask += layer * args.mask_layer_stride;
    part.shift += layer * dims;
    part.gram += layer * cka_packed(k);
    const bool serial = part.layers * std::min(args.rows, kCkaDepth) * k * k <= kSerialWork;
    const auto run = [&](void (*kernel)(const CkaPushArgs&, int64_t, int64_t), int64_t items) {
      launch_cpu(kernel, part, items, serial ? items : 1);
    };
    launch_cpu(&cka_rows_cpu, part, part.layers, part.layers);  // a few bytes a row
    if (part.adopt) run(&cka_shift_cpu, part.layers * cka_shift_items(part.x.dim, part.y.dim));
    const int64_t rows = *std::max_element(part.counts, part.counts + part.layers);
    for (part.first = 0; part.first < rows; part.first += kCkaDepth) {
      run(&cka_pack_cpu, part.layers * (kCkaDepth / kCkaRowChunk));
      run(&cka_long_rows_cpu, part.layers);
      take_turns(&cka_product_cpu, part, part.layers * cka_product_items(k), serial);
    }
  }
#endif
}

void read_terms(const CkaTermsArgs& args, const Tensor& on) {
  INFLECTION_RUN(cka_terms, args, on, args.layers * cka_term_items(args.dim_x, args.dim_y), 4);
  INFLECTION_RUN(cka_terms_merge, args, on, args.layers, 64);
}

void check_pair(const Tensor& x, const Tensor& y) {
  bool same = x.dim() == y.dim() && x.get_device() == y.get_device();
  for (int64_t d = 0; same && d + 1 < x.dim(); ++d) same = x.size(d) == y.size(d);
  STD_TORCH_CHECK(same, "x and y: expected the same device and the same sizes but for the last");
}

void cka_push(Tensor gram, Tensor shift, Tensor x, Tensor y, std::optional<Tensor> mask, bool adopt) {
  std::vector<int64_t> x_offsets, y_offsets;
  CkaPushArgs args{};
  args.x = side_of(x, "x", x_offsets);
  args.y = side_of(y, "y", y_offsets);
  check_pair(x, y);
  args.layers = layers_of(x);
  args.rows = x.size(x.dim() - 2);
  const int64_t dims = args.x.dim + args.y.dim, packed = cka_packed(kCkaHead + dims);
  check_device(gram, "gram");
  check_device(shift, "shift");
  STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Double && gram.is_contiguous() && gram.numel() == args.layers * packed,
                  "gram: expected contiguous float64 [layers, ", packed, "]");
  STD_TORCH_CHECK(shift.scalar_type() == ScalarType::Float && shift.is_contiguous() && shift.numel() == args.layers * dims,
                  "shift: expected contiguous float32 [layers, ", dims, "]");
  if (mask.has_value()) {
    check_device(*mask, "mask");
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == args.layers &&
                        mask->size(1) == args.rows, "mask: expected bool [layers, rows]");
    args.mask = static_cast<const bool*>(mask->const_data_ptr());
    args.mask_layer_stride = mask->stride(0);
    args.mask_row_stride = mask->stride(1);
  }
  args.adopt = adopt;
  args.shift = static_cast<float*>(shift.data_ptr());
  args.gram = static_cast<double*>(gram.data_ptr());
  push(args, x);
}

Tensor new_terms(const Tensor& like, std::vector<int64_t> sizes) {
  sizes.push_back(3);
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Double);
}

Tensor cka_gram_terms(Tensor gram, int64_t dim_x, int64_t dim_y, bool debiased) {
  check_device(gram, "gram");
  STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Double && gram.is_contiguous() && gram.dim() == 2 && dim_x >= 0 &&
                      dim_y >= 0 && gram.size(1) == cka_packed(kCkaHead + dim_x + dim_y),
                  "gram: expected contiguous float64 [layers, packed] of a state of these widths");
  const int64_t layers = gram.size(0);
  Tensor terms = new_terms(gram, {layers});
  Tensor partial = scratch(gram, layers * cka_term_items(dim_x, dim_y) * kCkaTermSums, ScalarType::Double);
  read_terms({static_cast<const double*>(gram.const_data_ptr()), layers, dim_x, dim_y, debiased,
              static_cast<double*>(partial.data_ptr()), static_cast<double*>(terms.data_ptr())}, gram);
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
  const int64_t dims = args.x.dim + args.y.dim, packed = cka_packed(kCkaHead + dims), layers = layers_of(x);
  const int64_t group = std::clamp<int64_t>(kGroupBytes / (packed * 8), 1, std::max<int64_t>(layers, 1));
  Tensor terms = new_terms(x, sizes);
  Tensor gram = scratch(x, group * packed, ScalarType::Double), shift = scratch(x, group * dims, ScalarType::Float);
  Tensor partial = scratch(x, group * cka_term_items(args.x.dim, args.y.dim) * kCkaTermSums, ScalarType::Double);
  args.gram = static_cast<double*>(gram.data_ptr());
  args.shift = static_cast<float*>(shift.data_ptr());
  for (int64_t layer = 0; layer < layers; layer += group) {
    torch::stable::zero_(gram);
    args.layers = std::min(group, layers - layer);
    args.x.offsets = x_offsets.data() + layer;
    args.y.offsets = y_offsets.data() + layer;
    push(args, x);
    read_terms({args.gram, args.layers, args.x.dim, args.y.dim, debiased, static_cast<double*>(partial.data_ptr()),
                static_cast<double*>(terms.data_ptr()) + layer * 3}, x);
  }
  return terms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inflection_fast, INFLECTION_DEVICE_KEY, m) {
  m.impl("cka_push", TORCH_BOX(&cka_push));
  m.impl("cka_gram_terms", TORCH_BOX(&cka_gram_terms));
  m.impl("cka_terms", TORCH_BOX(&cka_terms));
}

}  // namespace inflection
