#include "act_sq.h"

#include <algorithm>

#include "portable.h"

namespace fastprune {
namespace {

constexpr int64_t kSerial = 1 << 15;  // elements below which one thread is faster than waking the others
constexpr int kLanes = 128;    // tokens t, t + 128, t + 256, ... are added up one after the other
constexpr int kColumns = 32;   // 128 x 32 float64 partial sums are 32 KB

template <class Value>
FASTPRUNE_INLINE void square_rows(double* partial, const Value* x, int64_t x_stride, int64_t n_tokens, int columns) {
  for (int64_t token = 0; token < n_tokens; ++token) {
    double* sums = partial + token % kLanes * kColumns;
    const Value* values = x + token * x_stride;
    for (int column = 0; column < columns; ++column) {
      const double value = static_cast<double>(values[column]);
      sums[column] += value * value;
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half * kColumns; ++i) partial[i] += partial[half * kColumns + i];
  }
}

FASTPRUNE_CLONES void square_panel(double* partial, const float* x, int64_t x_stride, int64_t n_tokens, int columns) {
  square_rows(partial, x, x_stride, n_tokens, columns);
}
FASTPRUNE_CLONES void square_panel(double* partial, const double* x, int64_t x_stride, int64_t n_tokens, int columns) {
  square_rows(partial, x, x_stride, n_tokens, columns);
}

}  // namespace

template <class Acc, class Value>
void add_column_squares(Acc* acc, const Value* x, int64_t x_stride, int64_t n_tokens, int64_t columns, int threads) {
  const int64_t panels = (columns + kColumns - 1) / kColumns;
  parallel_ranges(panels, n_tokens * columns < kSerial ? 1 : threads, [&](int, int64_t begin, int64_t end) {
    alignas(64) double partial[kLanes * kColumns];
    for (int64_t first = begin * kColumns; first < std::min(columns, end * kColumns); first += kColumns) {
      const int width = static_cast<int>(std::min<int64_t>(kColumns, columns - first));
      std::fill_n(partial, kLanes * kColumns, 0.0);
      square_panel(partial, x + first, x_stride, n_tokens, width);
      for (int i = 0; i < width; ++i) {
        acc[first + i] = static_cast<Acc>(static_cast<double>(acc[first + i]) + partial[i]);
      }
    }
  });
}

template void add_column_squares(float*, const float*, int64_t, int64_t, int64_t, int);
template void add_column_squares(float*, const double*, int64_t, int64_t, int64_t, int);
template void add_column_squares(double*, const float*, int64_t, int64_t, int64_t, int);
template void add_column_squares(double*, const double*, int64_t, int64_t, int64_t, int);

}  // namespace fastprune
