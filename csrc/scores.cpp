#include "scores.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "portable.h"

namespace fastprune {
namespace {

template <class Compute>
FASTPRUNE_INLINE Compute multiply(Compute a, Compute b) {
  return a * b;
}

template <class Compute>
FASTPRUNE_INLINE Compute magnitude(Compute a) {
  return std::fabs(a);
}

template <Formula formula, class Compute>
FASTPRUNE_INLINE Compute score(Compute w, Compute s) {
  switch (formula) {
#define FASTPRUNE_SCORE(name, score) \
  case Formula::name: return score;
    FASTPRUNE_FORMULAS(FASTPRUNE_SCORE)
#undef FASTPRUNE_SCORE
  }
  return w;
}

template <Formula formula, class Weight, class Statistic>
FASTPRUNE_INLINE void form_loop(const Weight* weight, const Statistic* statistic, int count, float* out) {
  using Widened = decltype(widen(Weight{}));
  // The weight's magnitude is asked for with a statistic type of float, which is then not read.
  using Compute = std::conditional_t<std::is_same_v<Widened, double> || std::is_same_v<Statistic, double>, double, float>;
  for (int i = 0; i < count; ++i) {
    const Compute s = formula == Formula::abs_weight ? Compute{1} : static_cast<Compute>(statistic[i]);
    out[i] = static_cast<float>(score<formula>(static_cast<Compute>(widen(weight[i])), s)) + 0.0f;
  }
}

template <class Weight, class Statistic>
FASTPRUNE_INLINE void form_typed(Formula formula, const Weight* weight, const Statistic* statistic, int count, float* out) {
  switch (formula) {
#define FASTPRUNE_LOOP(name, score) \
  case Formula::name: return form_loop<Formula::name>(weight, statistic, count, out);
    FASTPRUNE_FORMULAS(FASTPRUNE_LOOP)
#undef FASTPRUNE_LOOP
  }
}

template <class Statistic>
FASTPRUNE_INLINE void form_any(Dtype dtype, const void* weight, int64_t begin, Formula formula,
                               const Statistic* statistic, int count, float* out) {
  switch (dtype) {
    case Dtype::float32: return form_typed(formula, static_cast<const float*>(weight) + begin, statistic, count, out);
    case Dtype::float64: return form_typed(formula, static_cast<const double*>(weight) + begin, statistic, count, out);
    case Dtype::float16: return form_typed(formula, static_cast<const Half*>(weight) + begin, statistic, count, out);
    case Dtype::bfloat16: return form_typed(formula, static_cast<const BFloat*>(weight) + begin, statistic, count, out);
  }
}

FASTPRUNE_CLONES void form_with_float(Dtype dtype, const void* weight, int64_t begin, Formula formula,
                                      const float* statistic, int count, float* out) {
  form_any(dtype, weight, begin, formula, statistic, count, out);
}

FASTPRUNE_CLONES void form_with_double(Dtype dtype, const void* weight, int64_t begin, Formula formula,
                                       const double* statistic, int count, float* out) {
  form_any(dtype, weight, begin, formula, statistic, count, out);
}

// The statistic of weights begin .. begin + count as consecutive values: where it stands, if it has the weight's layout,
// else spread out into `tile` row by row.
template <class Statistic>
const Statistic* consecutive(const ScoreSource& source, int64_t begin, int count, Statistic* tile) {
  const auto* statistic = static_cast<const Statistic*>(source.statistic);
  const int64_t row_stride = source.statistic_row_stride, column_stride = source.statistic_column_stride;
  if (source.formula == Formula::abs_weight) return tile;
  if (column_stride == 1 && row_stride == source.columns) return statistic + begin;
  for (int done = 0; done < count;) {
    const int64_t row = (begin + done) / source.columns, column = (begin + done) % source.columns;
    const int length = static_cast<int>(std::min<int64_t>(count - done, source.columns - column));
    const Statistic* from = statistic + row * row_stride + column * column_stride;
    if (column_stride == 1) {
      std::memcpy(tile + done, from, length * sizeof(Statistic));
    } else {
      for (int i = 0; i < length; ++i) tile[done + i] = from[i * column_stride];
    }
    done += length;
  }
  return tile;
}

}  // namespace

void form_scores(const ScoreSource& source, int64_t begin, int count, float* out) {
  if (source.statistic_dtype == Dtype::float64) {
    double tile[kTile];
    form_with_double(source.weight_dtype, source.weight, begin, source.formula,
                     consecutive(source, begin, count, tile), count, out);
  } else {
    float tile[kTile];
    form_with_float(source.weight_dtype, source.weight, begin, source.formula, consecutive(source, begin, count, tile),
                    count, out);
  }
}

}  // namespace fastprune
