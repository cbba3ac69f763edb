// One tile of the product, for one instruction set and type: included by per_example.cpp with
//   TILE_NAME, TILE_TARGET, TILE_VALUE, TILE_LANES, TILE_ROWS, TILE_VECTORS, TILE_FMA
// defined, since a function's instruction set cannot depend on a template's argument.
//
// ROWS x VECTORS registers hold the product of one example. A step loads VECTORS registers of inputs, broadcasts ROWS
// errors and does ROWS * VECTORS multiply-adds, which is what bounds it; sums over examples are added up where they lie,
// in tiles that stay in the first cache from one example to the next.
__attribute__((target(TILE_TARGET))) void TILE_NAME(const TILE_VALUE* errors, const TILE_VALUE* inputs,
                                                    const Span* spans, int64_t n_spans,
                                                    const Sums<TILE_VALUE>& sums) {
  typedef TILE_VALUE Register __attribute__((vector_size(TILE_LANES * sizeof(TILE_VALUE)), may_alias));
  typedef Register Unaligned __attribute__((aligned(sizeof(TILE_VALUE))));
  constexpr int kColumns = TILE_VECTORS * TILE_LANES;
  for (const TILE_VALUE* sum : {sums.plain, sums.absolute, sums.squared}) {  // fetched while the first product is formed
    for (int row = 0; sum != nullptr && row < TILE_ROWS; ++row) {
      for (int v = 0; v < TILE_VECTORS; ++v) __builtin_prefetch(sum + row * sums.stride + v * TILE_LANES, 1);
    }
  }
  for (int64_t example = 0; example < n_spans; ++example) {
    Register product[TILE_ROWS][TILE_VECTORS] = {};
    for (int64_t token = spans[example].start; token < spans[example].end; ++token) {
      const Register* input = reinterpret_cast<const Register*>(inputs + token * kColumns);
#pragma GCC unroll 8
      for (int row = 0; row < TILE_ROWS; ++row) {
        const Register error = errors[token * TILE_ROWS + row] - Register{};
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; ++v) product[row][v] = TILE_FMA(error, input[v], product[row][v]);
      }
    }
// A macro, since a lambda would not be compiled for the instruction set.
#define TILE_ADD(sum, UPDATED)                                                                    \
  if (sum != nullptr) {                                                                           \
    _Pragma("GCC unroll 8") for (int row = 0; row < TILE_ROWS; ++row) {                           \
      Unaligned* to = reinterpret_cast<Unaligned*>(sum + row * sums.stride);                      \
      _Pragma("GCC unroll 8") for (int v = 0; v < TILE_VECTORS; ++v) {                            \
        const Register g = product[row][v];                                                       \
        to[v] = UPDATED;                                                                          \
      }                                                                                           \
    }                                                                                             \
  }
    TILE_ADD(sums.plain, to[v] + g)
    TILE_ADD(sums.absolute, to[v] + (g < 0 ? -g : g))
    TILE_ADD(sums.squared, TILE_FMA(g, g, to[v]))
#undef TILE_ADD
  }
}
#undef TILE_NAME
#undef TILE_TARGET
#undef TILE_VALUE
#undef TILE_LANES
#undef TILE_ROWS
#undef TILE_VECTORS
#undef TILE_FMA
