// The k best scores of each of several matrices, in exact order.
#pragma once

#include <cstdint>
#include <vector>

#include "scores.h"

namespace fastprune {

struct Selection {
  ScoreSource source;
  int64_t n, k;      // k <= n
  int64_t* indices;  // k of them, best first and ties by the lower index
  float* values;     // k of them
};

// Returns for each -1, or the first index whose score is not a number, and then nothing has been written for it. The
// result does not depend on the number of threads.
std::vector<int64_t> top_scores(const std::vector<Selection>& selections, int threads);

}  // namespace fastprune
