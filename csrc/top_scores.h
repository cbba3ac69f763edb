// The k best scores of a matrix, in exact order.
#pragma once

#include <cstdint>

#include "scores.h"

namespace fastprune {

// Writes the k best of n scores, best first and ties by the lower index; k <= n. Returns -1, or the first index whose
// score is not a number, and then nothing has been written. The result does not depend on the number of threads.
int64_t top_scores(const ScoreSource& source, int64_t n, int64_t k, int threads, int64_t* indices, float* values);

}  // namespace fastprune
