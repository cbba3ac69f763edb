// Selection of the best scores of many matrices at once: a sample gives each group a cut, one pass over weights and
// statistics collects what reaches it, and that is sorted. Where a sample misleads, passes over the digits of the
// scores (and of the positions, if scores are equal) find the exact cut, and a last one collects exactly k.
//
// Bytes that have to move: a weight and its statistic once, 6 of a bfloat16 weight; 16.7 M of them are 100 MB, 33 us at
// 3 TB/s. Everything else (two launches before that pass, one wait for the device, about 16 short launches to sort)
// hardly grows with the matrix, which is why several matrices can share it.
#include <cub/device/device_radix_sort.cuh>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "launch.cuh"
#include "operations.h"
#include "top_scores_kernels.cuh"

namespace fastprune::cuda {
namespace {

constexpr uint64_t kMostWeights = uint64_t{1} << 43;  // of a group, see sample_position

int bits_of(uint64_t highest) {
  int bits = 1;
  while (bits < 64 && highest >> bits) ++bits;
  return bits;
}

cudaError_t sort_pairs(void* temporary, size_t& bytes, cub::DoubleBuffer<uint64_t>& keys,
                       cub::DoubleBuffer<uint64_t>& values, uint64_t count, int bits, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, values, count, 0, bits, stream);
}

class Run {
 public:
  explicit Run(const Selection& selection) {
    const int64_t n_sources = static_cast<int64_t>(selection.sizes.size());
    if (selection.group_sizes.size() != selection.ks.size()) throw std::invalid_argument("ks: expected one per group");
    int64_t source = 0;
    uint64_t tiles = 0, slots = 0;
    for (size_t g = 0; g < selection.ks.size(); ++g) {
      Group group{};
      group.first_matrix = static_cast<int>(source);
      group.matrices = static_cast<int>(selection.group_sizes[g]);
      if (group.matrices < 1 || source + group.matrices > n_sources) {
        throw std::invalid_argument("group_sizes: expected positive numbers that add up to the number of matrices");
      }
      for (; source < group.first_matrix + group.matrices; ++source) {
        const int64_t size = selection.sizes[source];
        if (size < 0 || size > UINT32_MAX) throw std::invalid_argument("a matrix has 2^32 weights or more");
        Matrix matrix{};
        matrix.position = static_cast<int64_t>(group.weights);
        matrix.size = static_cast<uint32_t>(size);
        matrix.first_tile = static_cast<uint32_t>(tiles);
        matrix.group = static_cast<int>(g);
        if (!selection.sources.empty()) describe(selection.sources.at(source), matrix);
        matrices_.push_back(matrix);
        tiles += (size + kTile - 1) / kTile;
        group.weights += size;
      }
      if (selection.ks[g] < 0 || static_cast<uint64_t>(selection.ks[g]) > group.weights) {
        throw std::invalid_argument("ks: expected 0 to the number of weights of the group");
      }
      group.k = selection.ks[g];
      choose_mode(group);
      group.first_slot = slots;
      group.first_output = outputs_;
      slots += group.capacity;
      outputs_ += group.k;
      most_weights_ = std::max(most_weights_, group.weights);
      groups_.push_back(group);
    }
    if (source != n_sources) {
      throw std::invalid_argument("group_sizes: expected them to add up to the number of matrices");
    }
    if (most_weights_ >= kMostWeights) throw std::invalid_argument("a group has 2^43 weights or more");
    tiles_ = blocks_for(tiles, 1);
    slots_ = slots;
  }

  // Assigns the parts of the workspace; with a null base only adds up their sizes.
  size_t lay_out(void* base) {
    size_t used = 0;
    const auto part = [&](auto*& pointer, uint64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(reinterpret_cast<uintptr_t>(base) + used);
      used = (used + count * sizeof(*pointer) + 255) / 256 * 256;
    };
    part(matrices, matrices_.size());
    part(groups, groups_.size());
    part(states, groups_.size());
    part(spans, groups_.size());
    part(samples, groups_.size() * kSampled);
    part(histograms, groups_.size() * kBins);
    part(positions, slots_);
    part(ranks, slots_);
    part(other_positions, slots_);
    part(other_ranks, slots_);
    cub::DoubleBuffer<uint64_t> none(nullptr, nullptr);
    check(sort_pairs(nullptr, temporary_bytes, none, none, slots_, 64, nullptr), "cub::DeviceRadixSort");
    part(temporary, temporary_bytes);
    return used;
  }

  std::optional<std::pair<int64_t, int64_t>> select(int64_t* out_source, int64_t* out_index, float* out_score,
                                                    cudaStream_t stream) {
    stream_ = stream;
    states_.assign(groups_.size(), State{});
    for (size_t g = 0; g < groups_.size(); ++g) {
      State& state = states_[g];
      state.first_nan = kNone;
      state.collects = 1;
      if (groups_[g].mode == Mode::everything) state.cut_rank = ~0u, state.cut_position = kNone;
    }
    spans_.assign(groups_.size(), Span{0});
    upload_descriptors();
    const unsigned n_groups = static_cast<unsigned>(groups_.size());
    const unsigned sample_blocks = blocks_for(uint64_t{n_groups} * kSampled, kThreads);
    start("sample_kernel", sample_kernel, sample_blocks, matrices, groups, samples);
    launch("sample_cut_kernel", sample_cut_kernel, n_groups, kSearchThreads, stream_, groups, samples, states);
    collect();
    if (const auto nan = first_nan()) return nan;
    if (any_misled()) search();
    write(out_source, out_index, out_score);
    return std::nullopt;
  }

 private:
  static void describe(const ScoreSource& source, Matrix& matrix) {
    matrix.weight = source.weight;
    matrix.statistic = source.statistic;
    matrix.row_stride = source.statistic_row_stride;
    matrix.column_stride = source.statistic_column_stride;
    matrix.columns = static_cast<uint32_t>(std::max<int64_t>(source.columns, 1));
    matrix.weight_dtype = source.weight_dtype;
    matrix.statistic_dtype = source.statistic_dtype;
    matrix.formula = source.formula;
    matrix.streams = can_stream(matrix);
  }

  static void choose_mode(Group& group) {
    if (group.k == 0) {
      group.mode = Mode::nothing;
    } else if (group.weights <= kSampled || group.k > group.weights / 4) {
      group.mode = Mode::everything;
      group.capacity = group.weights;
    } else {
      group.mode = Mode::sampled;
      // Four standard deviations above the mean, and a little more where the mean is small. About `expected` weights
      // then reach the cut; that number spreads as the inverse root of the place, and more if scores cluster.
      const double weights = static_cast<double>(group.weights);
      const double mean = static_cast<double>(group.k) * kSampled / weights;
      group.sample_rank = static_cast<uint32_t>(std::min(kSampled - 1.0, mean + 4 * std::sqrt(mean) + 8));
      const double expected = (group.sample_rank + 1.0) * weights / kSampled;
      const double room = expected * (1.5 + 6 / std::sqrt(group.sample_rank + 1.0)) + 1024;
      group.capacity = std::min(group.weights, static_cast<uint64_t>(room));
    }
  }

  // matrices, groups, states and spans, which are neighbours in the workspace, in one copy.
  void upload_descriptors() {
    const uintptr_t base = reinterpret_cast<uintptr_t>(matrices);
    std::vector<char> bytes(reinterpret_cast<uintptr_t>(samples) - base);
    const auto place = [&](const auto* at, const auto& items) {
      const size_t offset = reinterpret_cast<uintptr_t>(at) - base;
      if (!items.empty()) std::memcpy(&bytes[offset], items.data(), items.size() * sizeof(*at));
    };
    place(matrices, matrices_);
    place(groups, groups_);
    place(states, states_);
    place(spans, spans_);
    upload(matrices, bytes.data(), bytes.size());
  }

  // From pageable memory, which CUDA has read by the time the call returns.
  void upload(void* to, const void* from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_),
          "top_scores: copy of descriptors to the device");
  }

  template <class... Parameters, class... Arguments>
  void start(const char* name, void (*kernel)(Parameters...), unsigned blocks, Arguments... arguments) {
    launch(name, kernel, blocks, kThreads, stream_, arguments...);
  }

  void collect() {
    const int n_matrices = static_cast<int>(matrices_.size());
    start("collect_kernel", collect_kernel, tiles_, matrices, n_matrices, groups, states, positions, ranks);
    check(cudaMemcpyAsync(states_.data(), states, states_.size() * sizeof(State), cudaMemcpyDeviceToHost, stream_),
          "top_scores: copy of counts from the device");
    check(cudaStreamSynchronize(stream_), "top_scores: cudaStreamSynchronize");
  }

  std::optional<std::pair<int64_t, int64_t>> first_nan() const {
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (states_[g].first_nan == kNone) continue;
      const int64_t position = static_cast<int64_t>(states_[g].first_nan);
      const Matrix* first = matrices_.data() + groups_[g].first_matrix;
      const int in_group = segment_of(first, groups_[g].matrices, &Matrix::position, position);
      return std::make_pair(int64_t{groups_[g].first_matrix} + in_group, position - first[in_group].position);
    }
    return std::nullopt;
  }

  bool any_misled() const {
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (misled(groups_[g], states_[g])) return true;
    }
    return false;
  }

  void search() {
    const int n_groups = static_cast<int>(groups_.size()), n_matrices = static_cast<int>(matrices_.size());
    start("start_search_kernel", start_search_kernel, blocks_for(n_groups, kThreads), groups, n_groups, states);
    check(cudaMemsetAsync(histograms, 0, groups_.size() * kBins * sizeof(Count), stream_),
          "top_scores: cudaMemsetAsync");
    std::vector<Digit> digits(std::begin(kRankDigits), std::end(kRankDigits));
    for (int shift = (bits_of(most_weights_) - 1) / kDigitBits * kDigitBits; shift >= 0; shift -= kDigitBits) {
      digits.push_back({true, shift});
    }
    for (const Digit digit : digits) {
      start("count_kernel", count_kernel, tiles_, matrices, n_matrices, states, histograms, digit);
      launch("extend_cut_kernel", extend_cut_kernel, n_groups, kSearchThreads, stream_, states, histograms, digit);
    }
    std::vector<bool> searched;
    for (size_t g = 0; g < groups_.size(); ++g) searched.push_back(misled(groups_[g], states_[g]));
    collect();
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (searched[g] && states_[g].found != groups_[g].k) fail_changed();
    }
  }

  [[noreturn]] static void fail_changed() {
    throw std::runtime_error("top_scores: the weights or statistics changed during the selection");
  }

  void write(int64_t* out_source, int64_t* out_index, float* out_score) {
    const int n_groups = static_cast<int>(groups_.size());
    uint64_t total = 0;
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (states_[g].found < groups_[g].k || states_[g].found > groups_[g].capacity) fail_changed();
      spans_[g].begin = total;
      total += states_[g].found;
    }
    cub::DoubleBuffer<uint64_t> by_position(positions, other_positions), by_rank(ranks, other_ranks);
    if (n_groups > 1) {
      upload(spans, spans_.data(), n_groups * sizeof(Span));
      start("compact_kernel", compact_kernel, blocks_for(total, kThreads), groups, n_groups, spans, total, positions,
            ranks, other_positions, other_ranks);
      by_position.selector = by_rank.selector = 1;
    }
    sort(by_position, by_rank, total, bits_of(most_weights_ - 1));
    // This one is stable, so that equal scores stay in the order of their positions.
    sort(by_rank, by_position, total, 32 + (n_groups > 1 ? bits_of(n_groups - 1) : 0));
    start("write_kernel", write_kernel, blocks_for(outputs_, kThreads), matrices, groups, n_groups, spans, outputs_,
          by_position.Current(), by_rank.Current(), out_source, out_index, out_score);
  }

  void sort(cub::DoubleBuffer<uint64_t>& keys, cub::DoubleBuffer<uint64_t>& values, uint64_t count, int bits) {
    check(sort_pairs(temporary, temporary_bytes, keys, values, count, bits, stream_), "cub::DeviceRadixSort");
  }

  std::vector<Matrix> matrices_;
  std::vector<Group> groups_;
  std::vector<State> states_;
  std::vector<Span> spans_;
  uint64_t slots_ = 0, outputs_ = 0, most_weights_ = 0;
  unsigned tiles_ = 0;
  cudaStream_t stream_ = nullptr;

  // Parts of the workspace, in this order.
  Matrix* matrices = nullptr;
  Group* groups = nullptr;
  State* states = nullptr;
  Span* spans = nullptr;
  uint32_t* samples = nullptr;
  Count* histograms = nullptr;
  uint64_t *positions = nullptr, *ranks = nullptr, *other_positions = nullptr, *other_ranks = nullptr;
  char* temporary = nullptr;
  size_t temporary_bytes = 0;
};

}  // namespace

size_t top_scores_workspace(const Selection& selection, int device) {
  check(cudaSetDevice(device), "top_scores: cudaSetDevice");
  return Run(selection).lay_out(nullptr);
}

std::optional<std::pair<int64_t, int64_t>> top_scores(const Selection& selection, Workspace workspace,
                                                      int64_t* out_source, int64_t* out_index, float* out_score,
                                                      int device, void* stream) {
  check(cudaSetDevice(device), "top_scores: cudaSetDevice");
  if (selection.sources.size() != selection.sizes.size()) throw std::invalid_argument("sizes: expected one per source");
  Run run(selection);
  workspace.require(run.lay_out(workspace.address));
  return run.select(out_source, out_index, out_score, static_cast<cudaStream_t>(stream));
}

}  // namespace fastprune::cuda
