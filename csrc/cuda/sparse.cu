// Single weights of many matrices gathered, scaled or written back, one thread for each.
#include <vector>

#include "floats.cuh"
#include "launch.cuh"
#include "operations.h"
#include "selection.cuh"

namespace fastprune::cuda {
namespace {

struct Piece {
  void* elements;
  const int64_t* offsets;
  void* old;
  uint64_t begin;  // among the weights of all pieces
  Dtype dtype;
};

template <class Bits>
__device__ __forceinline__ Bits* element_of(const Piece& piece, uint64_t i) {
  return static_cast<Bits*>(piece.elements) + piece.offsets[i];
}

// Keeps the old bits and writes scaled(bits), or zero.
template <class Bits, class Scaled>
__device__ __forceinline__ void replace(const Piece& piece, uint64_t i, bool zero, Scaled scaled) {
  Bits* element = element_of<Bits>(piece, i);
  const Bits bits = *element;
  static_cast<Bits*>(piece.old)[i] = bits;
  *element = zero ? Bits{0} : scaled(bits);
}

__global__ void __launch_bounds__(kThreads) apply_sparse_kernel(const Piece* pieces, int n_pieces, uint64_t total,
                                                                double scale) {
  const uint64_t at = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= total) return;
  const Piece& piece = pieces[segment_of(pieces, n_pieces, &Piece::begin, at)];
  const uint64_t i = at - piece.begin;
  const bool zero = scale == 0;
  const float factor = __double2float_rn(scale);
  switch (piece.dtype) {
    case Dtype::float32:
      return replace<uint32_t>(piece, i, zero, [&](uint32_t bits) {
        const float value = __uint_as_float(bits);
        return is_nan(value) ? bits : __float_as_uint(multiply(value, factor));
      });
    case Dtype::float64:
      return replace<uint64_t>(piece, i, zero, [&](uint64_t bits) {
        const double value = __longlong_as_double(static_cast<long long>(bits));
        return value == value ? static_cast<uint64_t>(__double_as_longlong(multiply(value, scale))) : bits;
      });
    case Dtype::float16:
      return replace<uint16_t>(piece, i, zero, [&](uint16_t bits) {
        const float value = widen_float16(bits);
        return is_nan(value) ? bits : round_to_float16(multiply(value, factor));
      });
    case Dtype::bfloat16:
      return replace<uint16_t>(piece, i, zero, [&](uint16_t bits) {
        const float value = widen_bfloat16(bits);
        return is_nan(value) ? bits : round_to_bfloat16(multiply(value, factor));
      });
  }
}

template <class Bits>
__device__ __forceinline__ void put_back(const Piece& piece, uint64_t i) {
  *element_of<Bits>(piece, i) = static_cast<const Bits*>(piece.old)[i];
}

__global__ void __launch_bounds__(kThreads) restore_sparse_kernel(const Piece* pieces, int n_pieces, uint64_t total) {
  const uint64_t at = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= total) return;
  const Piece& piece = pieces[segment_of(pieces, n_pieces, &Piece::begin, at)];
  const uint64_t i = at - piece.begin;
  switch (piece.dtype) {
    case Dtype::float64: return put_back<uint64_t>(piece, i);
    case Dtype::float32: return put_back<uint32_t>(piece, i);
    default: return put_back<uint16_t>(piece, i);
  }
}

// Puts the list where the kernel can read it; returns how many weights it has in all.
uint64_t upload(const std::vector<SparseWeights>& weights, Workspace workspace, cudaStream_t stream) {
  workspace.require(sparse_workspace(static_cast<int64_t>(weights.size())));
  std::vector<Piece> pieces;
  uint64_t total = 0;
  for (const SparseWeights& one : weights) {
    if (one.count < 0) throw std::invalid_argument("count: expected 0 or more, got " + std::to_string(one.count));
    pieces.push_back({one.elements, one.offsets, one.old, total, one.dtype});
    total += one.count;
  }
  const size_t bytes = pieces.size() * sizeof(Piece);
  check(cudaMemcpyAsync(workspace.address, pieces.data(), bytes, cudaMemcpyHostToDevice, stream),
        "copy of the list of sparse weights to the device");
  return total;
}

}  // namespace

size_t sparse_workspace(int64_t weights) { return weights * sizeof(Piece); }

void apply_sparse(const std::vector<SparseWeights>& weights, double scale, Workspace workspace, int device,
                  void* stream) {
  check(cudaSetDevice(device), "apply_sparse: cudaSetDevice");
  const uint64_t total = upload(weights, workspace, static_cast<cudaStream_t>(stream));
  launch("apply_sparse_kernel", apply_sparse_kernel, blocks_for(total, kThreads), kThreads,
         static_cast<cudaStream_t>(stream), static_cast<const Piece*>(workspace.address),
         static_cast<int>(weights.size()), total, scale);
}

void restore_sparse(const std::vector<SparseWeights>& weights, Workspace workspace, int device, void* stream) {
  check(cudaSetDevice(device), "restore_sparse: cudaSetDevice");
  const uint64_t total = upload(weights, workspace, static_cast<cudaStream_t>(stream));
  launch("restore_sparse_kernel", restore_sparse_kernel, blocks_for(total, kThreads), kThreads,
         static_cast<cudaStream_t>(stream), static_cast<const Piece*>(workspace.address),
         static_cast<int>(weights.size()), total);
}

}  // namespace fastprune::cuda
