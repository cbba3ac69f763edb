// Sums over examples of weight gradients, of their absolute values and of their squares. No example's gradient is ever
// written to memory.
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

// What is summed of the gradients, null where it is not wanted: (dy.features, x.features), unit column stride, one row
// stride for all.
template <class Value>
struct Sums {
  Value *plain, *absolute, *squared;
  int64_t stride;

  Sums at(int64_t row, int64_t column) const {
    const auto moved = [&](Value* sum) { return sum == nullptr ? sum : sum + row * stride + column; };
    return {moved(plain), moved(absolute), moved(squared), stride};
  }
};

// sum[o, i] += sum over spans of f(sum over their tokens t of dy[t, o] * x[t, i]), f the identity, the absolute value or
// the square; each product is formed once for all of them. Sums run over tokens and then over spans in their order, by
// fused multiply-adds in their type, so results are bit-identical for any number of threads, on any processor, and
// whichever other sums are wanted.
template <class Value>
void add_gradients(const Sums<Value>& sums, const TokenMatrix& dy, const TokenMatrix& x, const Span* spans,
                   int64_t n_spans, int threads);

}  // namespace fastprune
