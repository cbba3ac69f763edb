// The CUDA operations as the binding sees them: addresses of device memory, sizes and a stream, no header of CUDA or
// torch. Every function works on `device` and throws: std::runtime_error with the name of the call or kernel that
// failed, std::invalid_argument for sizes that cannot be served.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../scores.h"

namespace fastprune::cuda {

struct Workspace {
  void* address;  // a multiple of 16
  size_t bytes;

  void require(size_t needed) const {
    if (bytes >= needed && reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
    throw std::invalid_argument("workspace: expected " + std::to_string(needed) + " bytes at a multiple of 16, got " +
                                std::to_string(bytes));
  }
};

struct Selection {
  std::vector<ScoreSource> sources;  // as for the CPU; their addresses are of device memory
  std::vector<int64_t> sizes;        // weights of each source, < 2^32
  std::vector<int64_t> group_sizes;  // consecutive sources that are selected from together
  std::vector<int64_t> ks;           // how many of each group, at most its number of weights
};

// Only the sizes, groups and ks of the selection are read.
size_t top_scores_workspace(const Selection& selection, int device);

// Writes, group after group, the k best scores: the number of the source (unless out_source is null), the index in it
// and the score, best first, ties by source and index. Returns nothing, or the first source and index whose score is
// not a number, and then nothing has been written. Waits for the device once, or twice where a sample misled.
std::optional<std::pair<int64_t, int64_t>> top_scores(const Selection& selection, Workspace workspace,
                                                      int64_t* out_source, int64_t* out_index, float* out_score,
                                                      int device, void* stream);

// Of the ascending values a those that are not among the ascending values b, in order. Returns how many and waits.
size_t difference_workspace(int64_t a_size, int device);
int64_t difference(const int64_t* a, int64_t a_size, const int64_t* b, int64_t b_size, int64_t* out,
                   Workspace workspace, int device, void* stream);

struct SparseWeights {
  void* elements;
  const int64_t* offsets;  // different ones, inside the array
  void* old;               // as many elements as offsets
  int64_t count;
  Dtype dtype;
};

// All weights of the list in one launch. apply_sparse writes what stood there to `old`, then value * scale, rounded
// once, or +0 where scale is 0. NaN stays as it is. restore_sparse writes `old` back as bits.
size_t sparse_workspace(int64_t weights);
void apply_sparse(const std::vector<SparseWeights>& weights, double scale, Workspace workspace, int device,
                  void* stream);
void restore_sparse(const std::vector<SparseWeights>& weights, Workspace workspace, int device, void* stream);

}  // namespace fastprune::cuda
