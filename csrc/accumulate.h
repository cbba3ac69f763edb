// Sums that are added to an accumulator in place. Each is defined element by element, so the number of threads changes
// nothing.
#pragma once

#include <cstdint>

namespace fastprune {

// acc += |g| or acc += g * g for one example after the other. acc (rows, columns) has unit column stride and `acc_stride`
// elements between rows; g (examples, rows, columns) has no gaps.
template <class Value>
void add_abs(Value* acc, int64_t acc_stride, const Value* g, int64_t examples, int64_t rows, int64_t columns, int threads);
template <class Value>
void add_square(Value* acc, int64_t acc_stride, const Value* g, int64_t examples, int64_t rows, int64_t columns,
                int threads);

// acc[j] += sum over tokens of x[token, j]^2, in float64 and in the order that reference.accumulate_act_sq_sum states.
template <class Acc, class Value>
void add_column_squares(Acc* acc, const Value* x, int64_t x_stride, int64_t n_tokens, int64_t columns, int threads);

}  // namespace fastprune
