#include "per_example.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "portable.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTPRUNE_HAS_TILES 1
#include <immintrin.h>
#endif

namespace fastprune {
namespace {

// Adds the products of one panel of errors and one of inputs to a whole tile of the sums (see gradient_tile.h).
template <class Value>
using Tile = void (*)(const Value* errors, const Value* inputs, const Span* spans, int64_t n_spans,
                      const Sums<Value>& sums);

template <class Value>
struct Kernel {
  Tile<Value> tile;
  int64_t rows, columns;
};

bool avx512_allowed = true;

#ifdef FASTPRUNE_HAS_TILES

// 32 registers of AVX-512 hold a tile of 8 x 3, three inputs and an error; 16 of AVX2 hold 4 x 3.
#define TILE_NAME tile_avx512
#define TILE_TARGET "avx512f"
#define TILE_VALUE float
#define TILE_LANES 16
#define TILE_ROWS 8
#define TILE_VECTORS 3
#define TILE_FMA _mm512_fmadd_ps
#include "gradient_tile.h"

#define TILE_NAME tile_avx512
#define TILE_TARGET "avx512f"
#define TILE_VALUE double
#define TILE_LANES 8
#define TILE_ROWS 8
#define TILE_VECTORS 3
#define TILE_FMA _mm512_fmadd_pd
#include "gradient_tile.h"

#define TILE_NAME tile_avx2
#define TILE_TARGET "avx2,fma"
#define TILE_VALUE float
#define TILE_LANES 8
#define TILE_ROWS 4
#define TILE_VECTORS 3
#define TILE_FMA _mm256_fmadd_ps
#include "gradient_tile.h"

#define TILE_NAME tile_avx2
#define TILE_TARGET "avx2,fma"
#define TILE_VALUE double
#define TILE_LANES 4
#define TILE_ROWS 4
#define TILE_VECTORS 3
#define TILE_FMA _mm256_fmadd_pd
#include "gradient_tile.h"

template <class Value>
Kernel<Value> kernel() {
  constexpr int64_t lanes = 64 / sizeof(Value);
  if (avx512_allowed && __builtin_cpu_supports("avx512f")) return {tile_avx512, 8, 3 * lanes};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {tile_avx2, 4, 3 * lanes / 2};
  return {nullptr, 0, 0};
}

#else

template <class Value>
Kernel<Value> kernel() {
  return {nullptr, 0, 0};
}

#endif

constexpr int kTileElements = 8 * 3 * 16;  // of the largest kernel
constexpr size_t kAlignment = 64;

struct Freed {
  void operator()(void* memory) const { std::free(memory); }
};

template <class Value>
using Buffer = std::unique_ptr<Value[], Freed>;

template <class Value>
Buffer<Value> allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(Value) + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, std::max(bytes, kAlignment));
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<Value>(static_cast<Value*>(memory));
}

// Copies `count` features from `first` on, of each token of the spans, to panel (tokens, width); the rest of the width is
// zero. Tokens follow each other without the gaps between spans.
template <class Value, class Element>
void pack_panel(const TokenMatrix& matrix, const Element* data, const Span* spans, int64_t n_spans, int64_t first,
                int64_t count, int64_t width, Value* panel) {
  const int64_t stride = matrix.feature_stride;
  for (const Span* span = spans; span < spans + n_spans; ++span) {
    for (int64_t token = span->start; token < span->end; ++token, panel += width) {
      const Element* from = data + token * matrix.token_stride + first * stride;
      if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) panel[i] = static_cast<Value>(widen(from[i]));
      } else {
        for (int64_t i = 0; i < count; ++i) panel[i] = static_cast<Value>(widen(from[i * stride]));
      }
      std::fill(panel + count, panel + width, Value{});
    }
  }
}

template <class Value>
void pack(const TokenMatrix& matrix, const Span* spans, int64_t n_spans, int64_t first, int64_t width, Value* panel) {
  const int64_t count = std::min(width, matrix.features - first);
  const auto typed = [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(matrix.data);
    pack_panel(matrix, data, spans, n_spans, first, count, width, panel);
  };
  switch (matrix.dtype) {
    case Dtype::float32: return typed(float{});
    case Dtype::float64: return typed(double{});
    case Dtype::float16: return typed(Half{});
    case Dtype::bfloat16: return typed(BFloat{});
  }
}

// A tile of which rows or columns lie beyond the matrix is added to in copies.
template <class Value>
void add_tile(const Kernel<Value>& with, const Value* errors, const Value* inputs, const std::vector<Span>& spans,
              const Sums<Value>& sums, int64_t rows, int64_t columns) {
  const int64_t n_spans = static_cast<int64_t>(spans.size());
  if (rows == with.rows && columns == with.columns) return with.tile(errors, inputs, spans.data(), n_spans, sums);
  Value copies[3][kTileElements] = {};
  const Sums<Value> copied = {sums.plain ? copies[0] : nullptr, sums.absolute ? copies[1] : nullptr,
                              sums.squared ? copies[2] : nullptr, with.columns};
  const auto copy_rows = [&](const Sums<Value>& from, const Sums<Value>& to) {
    for (const auto sum : {&Sums<Value>::plain, &Sums<Value>::absolute, &Sums<Value>::squared}) {
      for (int64_t row = 0; from.*sum != nullptr && row < rows; ++row) {
        std::copy_n(from.*sum + row * from.stride, columns, to.*sum + row * to.stride);
      }
    }
  };
  copy_rows(sums, copied);
  with.tile(errors, inputs, spans.data(), n_spans, copied);
  copy_rows(copied, sums);
}

// Tokens that are packed at a time (an example is never cut): a panel of inputs, 512 x 48 x 4 bytes, leaves room in a
// second-level cache, and reading and writing the accumulator once for them costs a hundredth of their products.
constexpr int64_t kTokens = 512;
// Bytes of errors packed at a time. They are read from the third level once for each panel of inputs, 32 bytes for 384
// multiply-adds; packing the inputs again for the next block of rows costs less than 1 % of the products of 4096 rows.
constexpr int64_t kErrorBytes = int64_t{8} << 20;
constexpr int64_t kSerial = int64_t{1} << 18;  // multiply-adds below which one thread is faster than waking the others

}  // namespace

void allow_avx512(bool allowed) { avx512_allowed = allowed; }

bool has_gradient_kernel() { return kernel<float>().tile != nullptr; }

template <class Value>
void add_gradients(const Sums<Value>& sums, const TokenMatrix& dy, const TokenMatrix& x, const Span* spans,
                   int64_t n_spans, int threads) {
  const Kernel<Value> with = kernel<Value>();
  const int64_t panels = (dy.features + with.rows - 1) / with.rows;
  const int64_t column_panels = (x.features + with.columns - 1) / with.columns;
  std::vector<Span> packed;
  for (int64_t first = 0, last; first < n_spans; first = last) {
    int64_t tokens = 0;
    packed.clear();
    for (last = first; last < n_spans; ++last) {
      const int64_t length = spans[last].end - spans[last].start;
      if (last > first && tokens + length > kTokens) break;
      packed.push_back({tokens, tokens + length});
      tokens += length;
    }
    const int64_t panel = tokens * with.rows;
    const int64_t most = std::max<int64_t>(1, kErrorBytes / static_cast<int64_t>(sizeof(Value)) / panel);
    const int64_t block = std::min(panels, most);
    const int workers = tokens * dy.features * x.features < kSerial ? 1 : threads;
    const auto errors = allocate<Value>(block * panel);
    for (int64_t top = 0; top < panels; top += block) {
      const int64_t height = std::min(block, panels - top);
      parallel_ranges(height, workers, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          pack(dy, spans + first, last - first, (top + i) * with.rows, with.rows, &errors[i * panel]);
        }
      });
      // Down each panel of columns, so that a thread packs the inputs of few panels.
      parallel_ranges(height * column_panels, workers, [&](int, int64_t begin, int64_t end) {
        const auto inputs = allocate<Value>(tokens * with.columns);
        int64_t inside = -1;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t left = task / height * with.columns, i = task % height, row = (top + i) * with.rows;
          if (left != inside) pack(x, spans + first, last - first, inside = left, with.columns, inputs.get());
          add_tile(with, &errors[i * panel], inputs.get(), packed, sums.at(row, left),
                   std::min(with.rows, dy.features - row), std::min(with.columns, x.features - left));
        }
      });
    }
  }
}

template void add_gradients(const Sums<float>&, const TokenMatrix&, const TokenMatrix&, const Span*, int64_t, int);
template void add_gradients(const Sums<double>&, const TokenMatrix&, const TokenMatrix&, const Span*, int64_t, int);

}  // namespace fastprune
