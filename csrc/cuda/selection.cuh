// What a selection keeps on the device, and the arithmetic of finding one's way in it.
//
// A group is a run of matrices among whose weights the k best are selected: one matrix, or all of them for the global
// scope. A weight's position counts through the matrices of its group, so (rank of the score, position) is the order
// asked for, best first and ties by matrix and index, and no two weights are equal in it. A cut is a pair of this
// order: whatever is not behind it is collected.
#pragma once

#include <cstdint>

#include "scoring.cuh"

namespace fastprune::cuda {

using Count = unsigned long long;  // the 64 bit integer that atomics take

// 2048 runs of 16 neighbours, each run in a stretch of its own: one or two lines of memory per run.
constexpr uint32_t kSampled = 1 << 15, kRun = 16, kRuns = kSampled / kRun;

enum class Mode : int {
  everything,  // few weights, or k is most of them: all are collected and sorted
  sampled,     // a cut from a sample of the scores, which somewhat more than k should reach
  nothing,     // k is 0; the scores are only searched for NaN
};

struct Group {
  int first_matrix, matrices;
  Mode mode;
  uint32_t sample_rank;           // the cut is the sample of this place, from 0
  uint64_t weights, k, capacity;  // how many there are, are asked for, and can be collected
  uint64_t first_slot;            // of `capacity` slots for what is collected
  uint64_t first_output;          // of k
};

struct State {
  Count found;      // weights up to the cut; beyond `capacity` they are counted and not kept
  Count first_nan;  // lowest position, kNone if there is none
  Count cut_position;
  Count wanted;  // while searching: how many of the weights with the cut's leading digits are asked for
  uint32_t cut_rank;
  uint32_t collects, searches;  // whether the group takes part in the next collection, in the next digit
};

constexpr Count kNone = ~Count{0};

// The exact cut is found digit by digit, those of the rank before those of the position; the highest first.
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

struct Digit {
  bool of_position;
  int shift;
};

constexpr Digit kRankDigits[] = {{false, 22}, {false, 11}, {false, 0}};

__host__ __device__ inline uint32_t bin_of(uint64_t word, int shift) {
  return static_cast<uint32_t>(word >> shift) & (kBins - 1);
}

// Whether a weight has the cut's digits above this one.
__device__ __forceinline__ bool shares_prefix(uint32_t rank, uint64_t position, const State& state, Digit digit) {
  const int above = digit.shift + kDigitBits;
  if (!digit.of_position) return uint64_t{rank} >> above == uint64_t{state.cut_rank} >> above;
  return rank == state.cut_rank && position >> above == state.cut_position >> above;
}

__device__ __forceinline__ bool up_to_cut(uint32_t rank, uint64_t position, uint32_t cut_rank, uint64_t cut_position) {
  return rank < cut_rank || (rank == cut_rank && position <= cut_position);
}

// The last of the items, sorted by their member `begin`, that begins at or before `at`; it is not an empty one.
template <class Item, class Begin, class At>
__host__ __device__ inline int segment_of(const Item* items, int count, Begin Item::* begin, At at) {
  int low = 0, high = count;  // the answer is in [low, high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (items[middle].*begin <= at ? low : high) = middle;
  }
  return low;
}

// Position of a sample: neighbours within a run, runs at a drawn offset in equal stretches, since evenly spaced ones
// could all fall into one column.
__host__ __device__ inline uint64_t sample_position(uint32_t sample, uint64_t weights) {
  const uint64_t run = sample / kRun, stretch = weights / kRuns;
  uint64_t bits = (run + 1) * 0x9e3779b97f4a7c15u;
  bits ^= bits >> 31;
  const uint64_t drawn = (bits & 0xffffffffu) * (stretch - kRun + 1) >> 32;
  return run * stretch + drawn + sample % kRun;
}

}  // namespace fastprune::cuda
