// Sums of squared inputs.
#pragma once

#include <cstdint>

namespace fastprune {

// acc[j] += sum over tokens of x[token, j]^2, in float64 and in the order that reference.accumulate_act_sq_sum states.
// Defined column by column, so the number of threads changes nothing.
template <class Acc, class Value>
void add_column_squares(Acc* acc, const Value* x, int64_t x_stride, int64_t n_tokens, int64_t columns, int threads);

}  // namespace fastprune
