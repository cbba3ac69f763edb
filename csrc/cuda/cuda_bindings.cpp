// The boundary to Python: addresses, sizes, strides and a stream come in as integers, checked by fastprune/ops. No
// header of torch or CUDA is included, and importing the module calls neither, so it can be imported without a driver.
// The interpreter lock is released while the host waits for the device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "operations.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using fastprune::Dtype;
using fastprune::Formula;
namespace cuda = fastprune::cuda;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const std::array<std::pair<const char*, Dtype>, 4> kDtypes = {{{"float32", Dtype::float32},
                                                               {"float64", Dtype::float64},
                                                               {"float16", Dtype::float16},
                                                               {"bfloat16", Dtype::bfloat16}}};
const std::pair<const char*, Formula> kFormulas[] = {
#define FASTPRUNE_PAIR(name, score) {#name, Formula::name},
    FASTPRUNE_FORMULAS(FASTPRUNE_PAIR)
#undef FASTPRUNE_PAIR
};

template <class Named>
auto named(const Named& table, const char* what, const std::string& name) {
  for (const auto& [known, value] : table) {
    if (name == known) return value;
  }
  throw std::invalid_argument(std::string(what) + ": unknown name '" + name + "'");
}

// weight, its dtype, size, columns, statistic, its dtype, its row stride, its column stride, formula
using SourceTuple =
    std::tuple<Address, std::string, int64_t, int64_t, Address, std::string, int64_t, int64_t, std::string>;

std::optional<std::pair<int64_t, int64_t>> top_scores(const std::vector<SourceTuple>& sources,
                                                      const std::vector<int64_t>& group_sizes,
                                                      const std::vector<int64_t>& ks, Address workspace,
                                                      size_t workspace_bytes, Address out_source, Address out_index,
                                                      Address out_score, int device, Address stream) {
  cuda::Selection selection{{}, {}, group_sizes, ks};
  for (const SourceTuple& source : sources) {
    const auto& [weight, weight_dtype, size, columns, statistic, statistic_dtype, row_stride, column_stride, formula] =
        source;
    selection.sources.push_back({at(weight), named(kDtypes, "dtype", weight_dtype), at(statistic),
                                 named(kDtypes, "dtype", statistic_dtype), columns, row_stride, column_stride,
                                 named(kFormulas, "formula", formula)});
    selection.sizes.push_back(size);
  }
  return cuda::top_scores(selection, {at(workspace), workspace_bytes}, at<int64_t>(out_source), at<int64_t>(out_index),
                          at<float>(out_score), device, at(stream));
}

size_t top_scores_workspace(const std::vector<int64_t>& sizes, const std::vector<int64_t>& group_sizes,
                            const std::vector<int64_t>& ks, int device) {
  return cuda::top_scores_workspace({{}, sizes, group_sizes, ks}, device);
}

int64_t difference(Address a, int64_t a_size, Address b, int64_t b_size, Address out, Address workspace,
                   size_t workspace_bytes, int device, Address stream) {
  return cuda::difference(at<int64_t>(a), a_size, at<int64_t>(b), b_size, at<int64_t>(out),
                          {at(workspace), workspace_bytes}, device, at(stream));
}

// elements, offsets, old, count, dtype
using SparseTuple = std::tuple<Address, Address, Address, int64_t, std::string>;

std::vector<cuda::SparseWeights> sparse_weights(const std::vector<SparseTuple>& tuples) {
  std::vector<cuda::SparseWeights> weights;
  for (const auto& [elements, offsets, old, count, dtype] : tuples) {
    weights.push_back({at(elements), at<int64_t>(offsets), at(old), count, named(kDtypes, "dtype", dtype)});
  }
  return weights;
}

void apply_sparse(const std::vector<SparseTuple>& weights, double scale, Address workspace, size_t workspace_bytes,
                  int device, Address stream) {
  cuda::apply_sparse(sparse_weights(weights), scale, {at(workspace), workspace_bytes}, device, at(stream));
}

void restore_sparse(const std::vector<SparseTuple>& weights, Address workspace, size_t workspace_bytes, int device,
                    Address stream) {
  cuda::restore_sparse(sparse_weights(weights), {at(workspace), workspace_bytes}, device, at(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of fastprune. fastprune/ops/cuda.py is the only caller; addresses are not checked here.";
  py::list formulas;
  for (const auto& formula : kFormulas) formulas.append(formula.first);
  module.attr("formulas") = formulas;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("top_scores_workspace", &top_scores_workspace, unlocked);
  module.def("top_scores", &top_scores, unlocked);
  module.def("difference_workspace", &cuda::difference_workspace, unlocked);
  module.def("difference", &difference, unlocked);
  module.def("sparse_workspace", &cuda::sparse_workspace, unlocked);
  module.def("apply_sparse", &apply_sparse, unlocked);
  module.def("restore_sparse", &restore_sparse, unlocked);
}
