// csrc/core for Python, without torch: compiled by the test that uses it.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/cka.h"
#include "core/exact_sum.h"
#include "core/moments.h"
#include "core/row_gradient.h"
#include "core/row_state.h"
#include "core/score_form.h"

namespace py = pybind11;
using namespace inflection;

namespace {

std::map<std::string, float> reported(const RowState& state) {
  float entropy, lse, low, max_logit, keys, collision, sink;
  report(state.totals(), 0, {&entropy, &lse, &low, &max_logit, &keys, &collision, &sink});
  return {{"entropy", entropy},     {"lse", lse},  {"lse_low", low}, {"max_logit", max_logit}, {"keys", keys},
          {"collision", collision}, {"sink", sink}};
}

// d(loss)/d(score) of columns with these log-probabilities; the last two are a row's statistics and what comes in.
std::vector<float> gradient(const std::vector<float>& log_p, std::vector<float> row, std::vector<float> grads) {
  const RowGradients rows{&row[0], &row[1], nullptr, &row[2], &row[3], &grads[0], &grads[1], &grads[2], &grads[3]};
  const RowGradient of_row = RowGradient::of(rows, 0, 1.f, true);
  std::vector<float> out;
  for (const float x : log_p) out.push_back(of_row.at(expf(x), x));
  out[0] += of_row.first;
  return out;
}

AttentionStatsQkArgs bounds(int64_t length, int64_t left, int64_t right, bool causal,
                            const std::vector<int64_t>& packed) {
  AttentionStatsQkArgs args{};
  args.queries = args.keys = length;
  args.window_left = left, args.window_right = right, args.causal = causal;
  args.key_bounds = packed.empty() ? nullptr : packed.data();
  return args;
}

}  // namespace

PYBIND11_MODULE(core, m) {
  py::class_<RowState>(m, "RowState")
      .def(py::init<>())
      .def("push",
           [](RowState& s, py::array_t<float> x) {
    for (py::ssize_t i = 0; i < x.size(); ++i) s.push(x.at(i));
  })
      .def("merge", &RowState::merge)
      .def("see_first", [](RowState& s, float x) {
    s.first = x;
  }).def("report", reported);
  m.def("lost_in_sum", [](float a, float b) { return lost_in_sum(a, b, a + b); });
  m.def("gradient", gradient);
  m.def("rows_and_keys", [](int64_t length, int64_t left, int64_t right, bool causal, std::vector<int64_t> packed) {
    const AttentionStatsQkArgs args = bounds(length, left, right, causal, packed);
    std::vector<std::vector<int64_t>> out;
    for (int64_t i = 0; i < length; ++i) {
      const Range keys = keys_of_row(args, i), rows = rows_of_key(args, i);
      out.push_back({keys.low, keys.high, rows.low, rows.high, sink_key(args, i)});
    }
    return out;
  });
  m.def("scale", [](double scale, bool keep) {
    const ScoreScale form = ScoreScale::of(scale, keep);
    return std::vector<double>{form.factor, form.scale};
  });
  m.def("massive_limit", [](py::array_t<float> x) {
    float largest = 0.f;
    for (py::ssize_t i = 0; i < x.size(); ++i) largest = larger_or_nan(x.at(i), largest);
    return massive_limit(x.size(), largest, [&](float limit) {
      int64_t count = 0;
      for (py::ssize_t i = 0; i < x.size(); ++i) count += x.at(i) <= limit;
      return count;
    });
  });
  m.def("cka_term", [](double n, std::vector<double> s, int term, bool debiased) {
    const CkaSums sums{n,
                       {s[0], s[1]},
                       {s[2], s[3]},
                       {s[4], s[5]},
                       {s[6], s[7]},
                       {s[8], s[9], s[10]},
                       {s[11], s[12], s[13], s[14], s[15], s[16]}};
    return cka_term(sums, term, debiased);
  });
}
