// One matrix as a kernel sees it, and the scores of its weights, formed on the fly in registers.
#pragma once

#include "../scores.h"
#include "floats.cuh"

namespace fastprune::cuda {

struct Matrix {
  const void* weight;     // `size` values in row-major order, without gaps
  const void* statistic;  // float32 or float64; not read for Formula::abs_weight
  int64_t position;       // of its first weight among the weights of its group
  int64_t row_stride, column_stride;  // of the statistic, in elements; 0 broadcasts
  uint32_t size, columns;
  uint32_t first_tile;
  int group;
  Dtype weight_dtype, statistic_dtype;
  Formula formula;
  bool streams;  // whether vectors of four weights and of their statistics can be loaded, see can_stream
};

// Each thread forms four groups of four neighbouring scores, so a warp reads 512 consecutive bytes of float32 at once,
// and each thread has 96 bytes (bfloat16 weights) or 128 under way before it needs the first.
constexpr int kThreads = 256, kVector = 4, kVectors = 4, kPerThread = kVector * kVectors;
constexpr uint32_t kStep = kThreads * kPerThread;
constexpr uint32_t kTile = 2 * kStep;  // of one block; 16.7 M weights are 2048 tiles, about two rounds of a full H100

template <class Compute>
__device__ __forceinline__ Compute product(Formula formula, Compute w, Compute s) {
  switch (formula) {
#define FASTPRUNE_SCORE(name, score) \
  case Formula::name: return score;
    FASTPRUNE_FORMULAS(FASTPRUNE_SCORE)
#undef FASTPRUNE_SCORE
  }
  return w;
}

__device__ __forceinline__ float without_negative_zero(float score) { return __fadd_rn(score, 0.0f); }

// Any layout and dtype, one weight at a time; float64 where an operand is.
__device__ __forceinline__ float score_at(const Matrix& matrix, uint32_t index) {
  double w = 0, s = 1;
  switch (matrix.weight_dtype) {
    case Dtype::float32: w = static_cast<const float*>(matrix.weight)[index]; break;
    case Dtype::float64: w = static_cast<const double*>(matrix.weight)[index]; break;
    case Dtype::float16: w = widen_float16(static_cast<const uint16_t*>(matrix.weight)[index]); break;
    case Dtype::bfloat16: w = widen_bfloat16(static_cast<const uint16_t*>(matrix.weight)[index]); break;
  }
  const bool wide_statistic = matrix.statistic_dtype == Dtype::float64;
  if (matrix.formula != Formula::abs_weight) {
    const uint32_t row = index / matrix.columns, column = index - row * matrix.columns;
    const int64_t offset = row * matrix.row_stride + column * matrix.column_stride;
    s = wide_statistic ? static_cast<const double*>(matrix.statistic)[offset]
                       : static_cast<const float*>(matrix.statistic)[offset];
  }
  if (wide_statistic || matrix.weight_dtype == Dtype::float64) {
    return without_negative_zero(__double2float_rn(product(matrix.formula, w, s)));
  }
  // A float that went through a double is the same float.
  return without_negative_zero(product(matrix.formula, __double2float_rn(w), __double2float_rn(s)));
}

template <Formula formula>
__device__ __forceinline__ void form(const float (&w)[kPerThread], const float (&s)[kPerThread],
                                     float (&scores)[kPerThread]) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) scores[i] = without_negative_zero(product(formula, w[i], s[i]));
}

// The index of element i of this thread in the step that begins at `start`.
__device__ __forceinline__ uint32_t index_of(uint32_t start, int i) {
  return start + (i / kVector * kThreads + threadIdx.x) * kVector + i % kVector;
}

inline bool can_stream(const Matrix& matrix) {
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  if (matrix.weight_dtype == Dtype::float64 || !aligned(matrix.weight)) return false;
  if (matrix.formula == Formula::abs_weight) return true;
  if (matrix.statistic_dtype != Dtype::float32 || !aligned(matrix.statistic) || matrix.column_stride != 1) return false;
  return matrix.row_stride == matrix.columns || (matrix.columns % kVector == 0 && matrix.row_stride % kVector == 0);
}

__device__ __forceinline__ void spread(float4 four, float* to) {
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

__device__ __forceinline__ void load_statistic(const Matrix& matrix, uint32_t start, float (&s)[kPerThread]) {
  const float* from = static_cast<const float*>(matrix.statistic);
  const bool consecutive = matrix.row_stride == matrix.columns;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    int64_t offset = index_of(start, v * kVector);
    if (!consecutive) {
      const uint32_t row = static_cast<uint32_t>(offset) / matrix.columns;
      offset += row * (matrix.row_stride - int64_t{matrix.columns});
    }
    spread(__ldg(reinterpret_cast<const float4*>(from + offset)), s + v * kVector);
  }
}

__device__ __forceinline__ void load_weight(const float* from, uint32_t start, float (&w)[kPerThread]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    spread(__ldg(reinterpret_cast<const float4*>(from + index_of(start, v * kVector))), w + v * kVector);
  }
}

template <float (*widen)(uint32_t)>
__device__ __forceinline__ void load_weight(const uint16_t* from, uint32_t start, float (&w)[kPerThread]) {
  uint2 raw[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    raw[v] = __ldg(reinterpret_cast<const uint2*>(from + index_of(start, v * kVector)));
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    spread({widen(raw[v].x & 0xffffu), widen(raw[v].x >> 16), widen(raw[v].y & 0xffffu), widen(raw[v].y >> 16)},
           w + v * kVector);
  }
}

// A full step of a matrix that streams. The statistic is asked for first: widening the weights waits for their loads.
__device__ __forceinline__ void form_step(const Matrix& matrix, uint32_t start, float (&scores)[kPerThread]) {
  float w[kPerThread], s[kPerThread];
  if (matrix.formula != Formula::abs_weight) {
    load_statistic(matrix, start, s);
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) s[i] = 1.0f;
  }
  switch (matrix.weight_dtype) {
    case Dtype::float16: load_weight<widen_float16>(static_cast<const uint16_t*>(matrix.weight), start, w); break;
    case Dtype::bfloat16: load_weight<widen_bfloat16>(static_cast<const uint16_t*>(matrix.weight), start, w); break;
    default: load_weight(static_cast<const float*>(matrix.weight), start, w);
  }
  switch (matrix.formula) {
#define FASTPRUNE_FORM(name, score) \
  case Formula::name: return form<Formula::name>(w, s, scores);
    FASTPRUNE_FORMULAS(FASTPRUNE_FORM)
#undef FASTPRUNE_FORM
  }
}

// Calls visit(start, scores, valid) in every thread of the block, as often in each (`visit` may use the warp), until it
// has been given all weights of a tile: bit i of `valid` says whether scores[i], of weight index_of(start, i), is one.
template <class Visit>
__device__ __forceinline__ void visit_tile(const Matrix& matrix, uint32_t tile, Visit visit) {
  const uint64_t begin = uint64_t{tile} * kTile, end = min(begin + kTile, uint64_t{matrix.size});
  float scores[kPerThread] = {};
  for (uint64_t start = begin; start < end; start += kStep) {
    if (matrix.streams && start + kStep <= end) {
      form_step(matrix, static_cast<uint32_t>(start), scores);
      visit(static_cast<uint32_t>(start), scores, (1u << kPerThread) - 1);
      continue;
    }
#pragma unroll 1
    for (uint32_t i = 0; i < kPerThread; ++i) {
      // Element 0 of a step that begins here is element i of the step that begins at `start`.
      const uint64_t shifted = start + i / kVector * kThreads * kVector + i % kVector;
      const uint64_t index = shifted + threadIdx.x * kVector;
      if (index < end) scores[0] = score_at(matrix, static_cast<uint32_t>(index));
      visit(static_cast<uint32_t>(shifted), scores, index < end ? 1u : 0u);
    }
  }
}

}  // namespace fastprune::cuda
