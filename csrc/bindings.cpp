// The boundary to Python: addresses, sizes and strides come in as integers, checked by fastprune/ops. No header of
// torch is included, so the same build serves every torch; the interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "act_sq.h"
#include "per_example.h"
#include "scores.h"
#include "sparse.h"
#include "top_scores.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using fastprune::Dtype;
using fastprune::Formula;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void add_gradients(Dtype sum_dtype, Address plain, Address absolute, Address squared, int64_t stride, Dtype dtype,
                   Address dy, int64_t dy_token_stride, int64_t dy_stride, int64_t n_out, Address x,
                   int64_t x_token_stride, int64_t x_stride, int64_t n_in, Address spans, int64_t n_spans, int threads) {
  const fastprune::TokenMatrix errors{at<const void>(dy), dtype, dy_token_stride, dy_stride, n_out};
  const fastprune::TokenMatrix inputs{at<const void>(x), dtype, x_token_stride, x_stride, n_in};
  const auto add = [&](auto value) {
    using Value = decltype(value);
    const fastprune::Sums<Value> sums{at<Value>(plain), at<Value>(absolute), at<Value>(squared), stride};
    fastprune::add_gradients(sums, errors, inputs, at<const fastprune::Span>(spans), n_spans, threads);
  };
  if (sum_dtype == Dtype::float64) return add(double{});
  add(float{});
}

void add_column_squares(Dtype acc_dtype, Address acc, Dtype x_dtype, Address x, int64_t x_stride, int64_t n_tokens,
                        int64_t columns, int threads) {
  const auto add = [&](auto* sums, const auto* values) {
    fastprune::add_column_squares(sums, values, x_stride, n_tokens, columns, threads);
  };
  const bool wide_acc = acc_dtype == Dtype::float64, wide_x = x_dtype == Dtype::float64;
  if (wide_acc && wide_x) return add(at<double>(acc), at<const double>(x));
  if (wide_acc) return add(at<double>(acc), at<const float>(x));
  if (wide_x) return add(at<float>(acc), at<const double>(x));
  add(at<float>(acc), at<const float>(x));
}

// weight, its dtype, size, columns, statistic, its dtype, its row stride, its column stride, formula, k, indices, values
using SelectionTuple = std::tuple<Address, Dtype, int64_t, int64_t, Address, Dtype, int64_t, int64_t, Formula, int64_t,
                                  Address, Address>;

std::vector<int64_t> top_scores(const std::vector<SelectionTuple>& tuples, int threads) {
  std::vector<fastprune::Selection> selections;
  for (const SelectionTuple& tuple : tuples) {
    const auto& [weight, weight_dtype, n, columns, statistic, statistic_dtype, row_stride, column_stride, formula, k,
                 indices, values] = tuple;
    const fastprune::ScoreSource source{at<const void>(weight), weight_dtype, at<const void>(statistic),
                                        statistic_dtype,        columns,      row_stride,
                                        column_stride,          formula};
    selections.push_back({source, n, k, at<int64_t>(indices), at<float>(values)});
  }
  return fastprune::top_scores(selections, threads);
}

template <class Call>
void with_item_size(int item_size, Call call) {
  switch (item_size) {
    case 2: return call(uint16_t{});
    case 4: return call(uint32_t{});
    case 8: return call(uint64_t{});
  }
  throw std::invalid_argument("item_size: expected 2, 4 or 8, got " + std::to_string(item_size));
}

void gather(int item_size, Address from, Address offsets, int64_t count, Address to) {
  with_item_size(item_size, [&](auto bits) {
    fastprune::gather(at<const decltype(bits)>(from), at<const int64_t>(offsets), count, at<decltype(bits)>(to));
  });
}

void scatter(int item_size, Address to, Address offsets, int64_t count, Address from) {
  with_item_size(item_size, [&](auto bits) {
    fastprune::scatter(at<decltype(bits)>(to), at<const int64_t>(offsets), count, at<const decltype(bits)>(from));
  });
}

}  // namespace

PYBIND11_MODULE(_cpp, module) {
  module.doc() = "CPU kernels of fastprune. fastprune/ops/cpp.py is the only caller; nothing is checked here.";
  py::enum_<Dtype>(module, "Dtype")
      .value("float32", Dtype::float32)
      .value("float64", Dtype::float64)
      .value("float16", Dtype::float16)
      .value("bfloat16", Dtype::bfloat16);
  py::enum_<Formula> formulas(module, "Formula");
#define FASTPRUNE_VALUE(name, score) formulas.value(#name, Formula::name);
  FASTPRUNE_FORMULAS(FASTPRUNE_VALUE)
#undef FASTPRUNE_VALUE
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("has_gradient_kernel", &fastprune::has_gradient_kernel);
  module.def("allow_avx512", &fastprune::allow_avx512);
  module.def("add_gradients", &add_gradients, unlocked);
  module.def("add_column_squares", &add_column_squares, unlocked);
  module.def("top_scores", &top_scores, unlocked);
  module.def("gather", &gather, unlocked);
  module.def("scatter", &scatter, unlocked);
}
