// Scores of a range of weights, formed on the fly from the weight and its statistic.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace fastprune {

// The criteria with their sign and absolute value resolved; a square root has been taken by the caller.
enum class Formula : int {
  product,           //  w * s
  negated_product,   // -(w * s)
  abs_product,       // |w * s|
  abs_weight_times,  // |w| * s
  square_times,      //  w * w * s
  abs_weight,        // |w|
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
// to float32; -0 comes out as +0. Only products are used, so every compiler gives the bits that torch gives.
void form_scores(const ScoreSource& source, int64_t begin, int count, float* out);

}  // namespace fastprune
