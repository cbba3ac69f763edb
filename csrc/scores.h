// Scores of a range of weights, formed on the fly from the weight and its statistic.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace fastprune {

// The products of a weight w and its statistic s that scores are formed by (fastprune/ops/criteria.py); the caller has
// taken a square root. A new product is one line here and one in FORMULAS there: the enum, the switches and the bindings
// of the CPU and of CUDA expand this list. Write it with `multiply` and `magnitude` (each side has its own) and unary
// minus only: single correctly rounded operations, never contracted, are bit-identical to torch's.
#define FASTPRUNE_FORMULAS(X)                    \
  X(product, multiply(w, s))                     \
  X(negated_product, -multiply(w, s))            \
  X(abs_product, magnitude(multiply(w, s)))      \
  X(abs_weight_times, multiply(magnitude(w), s)) \
  X(square_times, multiply(multiply(w, w), s))   \
  X(abs_weight, magnitude(w)) /* reads no statistic */

enum class Formula : int {
#define FASTPRUNE_NAME(name, score) name,
  FASTPRUNE_FORMULAS(FASTPRUNE_NAME)
#undef FASTPRUNE_NAME
};

struct ScoreSource {
  const void* weight;  // n values in row-major order, without gaps
  Dtype weight_dtype;
  const void* statistic;  // float32 or float64; not read for abs_weight
  Dtype statistic_dtype;
  int64_t columns;
  int64_t statistic_row_stride, statistic_column_stride;  // in elements; 0 broadcasts
  Formula formula;
};

constexpr int kTile = 1024;  // scores per call: 4 KB of output and at most 16 KB of input stay in the first cache

// out[i] = score of weight begin + i, count <= kTile. Formed in float64 where an operand is, else in float32, and rounded
// to float32; -0 comes out as +0.
void form_scores(const ScoreSource& source, int64_t begin, int count, float* out);

}  // namespace fastprune
