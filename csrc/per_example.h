// Sums over examples of absolute or squared weight gradients, no gradient of an example ever being in memory.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace fastprune {

struct TokenMatrix {  // (tokens, features); strides in elements
  const void* data;
  Dtype dtype;
  int64_t token_stride, feature_stride, features;
};

struct Span {
  int64_t start, end;  // first token of an example and the one after its last
};

// Whether this processor has the instructions that the products below are written for.
bool has_gradient_kernel();

// Lets a machine with AVX-512 test what one without would run.
void allow_avx512(bool allowed);

// acc[o, i] += sum over spans of f(sum over their tokens t of dy[t, o] * x[t, i]), f the absolute value or the square.
// acc is (dy.features, x.features) with unit column stride. Sums run over tokens and then over spans in their order, by
// fused multiply-adds in the type of acc, so the bits depend neither on the threads nor on the processor.
template <class Value>
void add_gradients(Value* acc, int64_t acc_stride, const TokenMatrix& dy, const TokenMatrix& x, const Span* spans,
                   int64_t n_spans, bool square, int threads);

}  // namespace fastprune
