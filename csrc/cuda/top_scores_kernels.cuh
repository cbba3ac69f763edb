// The kernels of a selection. Atomics only count and take minima or slots; what is collected is sorted afterwards, so
// the order in which threads run leaves no trace in the result.
#pragma once

#include "selection.cuh"

namespace fastprune::cuda {
namespace {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kSearchThreads = kBins / 2;

__device__ const Matrix& matrix_of(const Matrix* matrices, const Group& group, uint64_t position) {
  const Matrix* first = matrices + group.first_matrix;
  return first[segment_of(first, group.matrices, &Matrix::position, static_cast<int64_t>(position))];
}

// ranks (groups, kSampled): the ranks of the sampled scores; last in the order where a score is not a number.
__global__ void __launch_bounds__(kThreads) sample_kernel(const Matrix* matrices, const Group* groups,
                                                          uint32_t* ranks) {
  constexpr uint32_t blocks = kSampled / kThreads;
  const Group& group = groups[blockIdx.x / blocks];
  if (group.mode != Mode::sampled) return;
  const uint32_t sample = blockIdx.x % blocks * kThreads + threadIdx.x;
  const uint64_t position = sample_position(sample, group.weights);
  const Matrix& matrix = matrix_of(matrices, group, position);
  const float score = score_at(matrix, static_cast<uint32_t>(position - matrix.position));
  ranks[uint64_t{blockIdx.x} * kThreads + threadIdx.x] = is_nan(score) ? ~0u : rank_of(score);
}

// Called by all kSearchThreads threads with the counts of kBins bins in shared memory: the first bin at which the
// running sum reaches `target`, and the sum before it. `sums` has an element per thread; `bin` and `before` are shared.
template <class Integer>
__device__ __forceinline__ void find_bin(const Integer* bins, Integer* sums, Integer target, uint32_t* bin,
                                         Integer* before) {
  const uint32_t t = threadIdx.x;
  const Integer first = bins[2 * t], pair = first + bins[2 * t + 1];
  sums[t] = pair;
  __syncthreads();
  for (uint32_t offset = 1; offset < kSearchThreads; offset *= 2) {
    const Integer other = t >= offset ? sums[t - offset] : 0;
    __syncthreads();
    sums[t] += other;
    __syncthreads();
  }
  const Integer start = sums[t] - pair;
  if (start < target && target <= sums[t]) {
    const bool second = target > start + first;
    *bin = 2 * t + second;
    *before = second ? start + first : start;
  }
  __syncthreads();
}

// One block for each group: the cut is the sample of the group's sample_rank, ties and all.
__global__ void __launch_bounds__(kSearchThreads) sample_cut_kernel(const Group* groups, const uint32_t* ranks,
                                                                    State* states) {
  constexpr int per_thread = kSampled / kSearchThreads;
  __shared__ uint32_t bins[kBins], sums[kSearchThreads], bin, before;
  const Group& group = groups[blockIdx.x];
  if (group.mode != Mode::sampled) return;
  uint32_t mine[per_thread];
#pragma unroll
  for (int i = 0; i < per_thread; ++i) {
    mine[i] = ranks[uint64_t{blockIdx.x} * kSampled + i * kSearchThreads + threadIdx.x];
  }
  uint32_t cut = 0, target = group.sample_rank + 1;
  for (int shift = 2 * kDigitBits; shift >= 0; shift -= kDigitBits) {
    bins[threadIdx.x] = bins[threadIdx.x + kSearchThreads] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
      if (uint64_t{mine[i]} >> (shift + kDigitBits) == uint64_t{cut} >> (shift + kDigitBits)) {
        atomicAdd(&bins[bin_of(mine[i], shift)], 1u);
      }
    }
    __syncthreads();
    find_bin(bins, sums, target, &bin, &before);
    cut |= bin << shift;
    target -= before;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    states[blockIdx.x].cut_rank = cut;
    states[blockIdx.x].cut_position = kNone;
  }
}

// Takes slots for what the warp has found with one atomic, so that the counter is no bottleneck.
__device__ __forceinline__ uint64_t take_slots(State* state, uint32_t count) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t through = count;
#pragma unroll
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kWarp, through, offset);
    if (lane >= offset) through += other;
  }
  Count first = 0;
  if (lane == 31) first = atomicAdd(&state->found, Count{through});
  return __shfl_sync(kWarp, first, 31) + through - count;
}

// One block for each tile. positions, ranks: the slots of all groups; a rank has its group in the upper 32 bits.
__global__ void __launch_bounds__(kThreads) collect_kernel(const Matrix* matrices, int n_matrices, const Group* groups,
                                                           State* states, uint64_t* positions, uint64_t* ranks) {
  const Matrix matrix = matrices[segment_of(matrices, n_matrices, &Matrix::first_tile, blockIdx.x)];
  State* state = states + matrix.group;
  if (!state->collects) return;
  const uint32_t cut_rank = state->cut_rank;
  const float cut_score = score_of(cut_rank);
  visit_tile(matrix, blockIdx.x - matrix.first_tile,
             [&](uint32_t start, const float(&scores)[kPerThread], uint32_t valid) {
               // One comparison passes over almost all warps; it lets NaN through, and everything if the cut is NaN.
               uint32_t candidates = 0, hits = 0;
#pragma unroll
               for (int i = 0; i < kPerThread; ++i) candidates |= uint32_t{!(scores[i] < cut_score)} << i;
               candidates &= valid;
               if (!__any_sync(kWarp, candidates != 0)) return;
               // What only the few need is read here and not kept in registers.
               const uint64_t cut_position = state->cut_position;
               const Group& group = groups[matrix.group];
#pragma unroll
               for (int i = 0; i < kPerThread; ++i) {
                 if (!(candidates >> i & 1)) continue;
                 const uint64_t position = matrix.position + index_of(start, i);
                 if (is_nan(scores[i])) {
                   atomicMin(&state->first_nan, Count{position});
                 } else if (up_to_cut(rank_of(scores[i]), position, cut_rank, cut_position)) {
                   hits |= 1u << i;
                 }
               }
               uint64_t slot = take_slots(state, __popc(hits));
#pragma unroll
               for (int i = 0; i < kPerThread; ++i) {
                 if (!(hits >> i & 1)) continue;
                 if (slot < group.capacity) {
                   positions[group.first_slot + slot] = matrix.position + index_of(start, i);
                   ranks[group.first_slot + slot] = uint64_t(matrix.group) << 32 | rank_of(scores[i]);
                 }
                 ++slot;
               }
             });
}

__host__ __device__ inline bool misled(const Group& group, const State& state) {
  return group.mode == Mode::sampled && (state.found < group.k || state.found > group.capacity);
}

// Groups whose sample misled are searched for their exact cut; the others have what they need.
__global__ void start_search_kernel(const Group* groups, int n_groups, State* states) {
  const int g = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (g >= n_groups) return;
  State& state = states[g];
  state.collects = state.searches = misled(groups[g], state);
  if (!state.searches) return;
  state.found = 0;
  state.cut_rank = 0;
  state.cut_position = 0;
  state.wanted = groups[g].k;
}

// histograms (groups, kBins): of the digit, over the weights that share the cut's digits above it.
__global__ void __launch_bounds__(kThreads) count_kernel(const Matrix* matrices, int n_matrices, const State* states,
                                                         Count* histograms, Digit digit) {
  __shared__ uint32_t bins[kBins];
  const Matrix matrix = matrices[segment_of(matrices, n_matrices, &Matrix::first_tile, blockIdx.x)];
  const State state = states[matrix.group];
  if (!state.searches) return;
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  visit_tile(matrix, blockIdx.x - matrix.first_tile,
             [&](uint32_t start, const float(&scores)[kPerThread], uint32_t valid) {
#pragma unroll
               for (int i = 0; i < kPerThread; ++i) {
                 const uint32_t rank = rank_of(scores[i]);
                 const uint64_t position = matrix.position + index_of(start, i);
                 if (!(valid >> i & 1) || !shares_prefix(rank, position, state, digit)) continue;
                 atomicAdd(&bins[bin_of(digit.of_position ? position : rank, digit.shift)], 1u);
               }
             });
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    if (bins[bin]) atomicAdd(&histograms[uint64_t(matrix.group) * kBins + bin], Count{bins[bin]});
  }
}

// One block for each group: extends the cut by a digit and clears the histogram for the next one. The search is over as
// soon as everything with the cut's digits is wanted.
__global__ void __launch_bounds__(kSearchThreads) extend_cut_kernel(State* states, Count* histograms, Digit digit) {
  __shared__ Count bins[kBins], sums[kSearchThreads], before;
  __shared__ uint32_t bin;
  State& state = states[blockIdx.x];
  if (!state.searches) return;
  Count* histogram = histograms + uint64_t{blockIdx.x} * kBins;
  for (int b = threadIdx.x; b < kBins; b += kSearchThreads) {
    bins[b] = histogram[b];
    histogram[b] = 0;
  }
  __syncthreads();
  find_bin(bins, sums, state.wanted, &bin, &before);
  if (threadIdx.x != 0) return;
  state.wanted -= before;
  const bool all_wanted = bins[bin] == state.wanted;
  const uint64_t lower_digits = (uint64_t{1} << digit.shift) - 1;
  uint64_t word = digit.of_position ? state.cut_position : state.cut_rank;
  word |= uint64_t{bin} << digit.shift | (all_wanted ? lower_digits : 0);
  if (digit.of_position) {
    state.cut_position = word;
  } else {
    state.cut_rank = static_cast<uint32_t>(word);
    if (all_wanted) state.cut_position = kNone;
  }
  state.searches = !all_wanted;
}

struct Span {
  uint64_t begin;  // where a group's entries stand among those of all groups
};

// Moves what the groups have collected together, group after group.
__global__ void __launch_bounds__(kThreads) compact_kernel(const Group* groups, int n_groups, const Span* spans,
                                                           uint64_t total, const uint64_t* positions,
                                                           const uint64_t* ranks, uint64_t* to_positions,
                                                           uint64_t* to_ranks) {
  const uint64_t i = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= total) return;
  const int g = segment_of(spans, n_groups, &Span::begin, i);
  const uint64_t slot = groups[g].first_slot + (i - spans[g].begin);
  to_positions[i] = positions[slot];
  to_ranks[i] = ranks[slot];
}

// The first k sorted entries of each group; `out_matrix` may be null.
__global__ void __launch_bounds__(kThreads) write_kernel(const Matrix* matrices, const Group* groups, int n_groups,
                                                         const Span* spans, uint64_t total, const uint64_t* positions,
                                                         const uint64_t* ranks, int64_t* out_matrix,
                                                         int64_t* out_index, float* out_value) {
  const uint64_t i = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= total) return;
  const int g = segment_of(groups, n_groups, &Group::first_output, i);
  const uint64_t from = spans[g].begin + (i - groups[g].first_output), position = positions[from];
  const Matrix& matrix = matrix_of(matrices, groups[g], position);
  if (out_matrix) out_matrix[i] = &matrix - matrices;
  out_index[i] = static_cast<int64_t>(position) - matrix.position;
  out_value[i] = score_of(static_cast<uint32_t>(ranks[from]));
}

}  // namespace
}  // namespace fastprune::cuda
