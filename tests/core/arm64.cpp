// The portable kernel of softmax statistics on the machine that this was compiled for, against its definition in double:
// `make arm64` runs it for arm64 under an emulator. Exits with 1 if a row errs by more than is stated.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

constexpr double kStated = 2e-6;  // nats, of entropy; relative to max(1, |value|) of the others
constexpr float kNothing = -std::numeric_limits<float>::infinity();

double worst = 0;

void compare(const char* name, float found, double truth) {
  const double error = std::abs(found - truth) / std::fmax(1.0, std::abs(truth));
  if (!(error <= kStated)) std::printf("%s: %.9g, in double %.9g\n", name, found, truth);
  worst = std::isnan(error) ? error : std::fmax(worst, error);
}

void check(int64_t rows, int64_t cols, float deviation, bool causal) {
  std::mt19937 random(static_cast<unsigned>(rows * 131 + cols));
  std::normal_distribution<float> normal(3.f, deviation);
  std::vector<float> logits(rows * cols), entropy(rows), lse(rows), collision(rows), keys(rows);
  for (float& x : logits) x = random() % 9 ? normal(random) : kNothing;
  inflection::AttentionStatsArgs args{};
  args.logits = logits.data();
  args.sizes[0] = args.batch = args.dims = 1;
  args.strides[0] = rows * cols;
  args.rows = rows, args.cols = cols, args.row_stride = cols, args.col_stride = 1;
  args.dtype = inflection::DType::f32, args.floor = -1e38f, args.scale = 1.0, args.causal = causal;
  args.out.entropy = entropy.data(), args.out.lse = lse.data();
  args.out.collision = collision.data(), args.out.keys = keys.data();
  inflection::attention_stats_cpu(args, 0, rows);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t end = causal ? std::min(row + 1, cols) : cols;
    double top = -INFINITY, sum = 0, dot = 0, square = 0;
    int64_t count = 0;
    for (int64_t col = 0; col < end; ++col) top = std::fmax(top, double{logits[row * cols + col]});
    for (int64_t col = 0; col < end; ++col) {
      const double x = double{logits[row * cols + col]} - top, e = std::exp(x);
      if (logits[row * cols + col] == kNothing) continue;
      ++count, sum += e, dot += e * x, square += e * e;
    }
    if (count == 0) {
      if (entropy[row] != 0 || lse[row] != kNothing || keys[row] != 0) worst = NAN;
      continue;
    }
    compare("entropy", entropy[row], std::log(sum) - dot / sum);
    compare("lse", lse[row], top + std::log(sum));
    compare("collision", collision[row], square / (sum * sum));
    compare("keys", keys[row], static_cast<double>(count));
  }
}

}  // namespace

int main() {
  for (const float deviation : {0.01f, 3.f, 100.f}) {
    for (const bool causal : {false, true}) {
      for (const int64_t cols : {1, 3, 7, 64, 129, 4097}) check(9, cols, deviation, causal);
    }
  }
  std::printf("kernels %d, largest error %.2g of %.0g stated\n", inflection::cpu_isa(-1), worst, kStated);
  return worst <= kStated ? 0 : 1;
}
