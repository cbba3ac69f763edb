// Most selections take one pass over the matrix: a sample of the scores gives a threshold that slightly more than k of
// them should reach, the pass collects those, and the exact cut is made among them. If the sample is misleading (too few
// scores reach the threshold, or far too many), three histogram passes over the whole matrix find the k-th score itself.
#include "top_scores.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "portable.h"

namespace fastprune {
namespace {

// Unsigned integers in the order of the floats they stand for (-0 does not occur).
uint32_t key_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Moving entries is the most frequent operation, so one takes 8 bytes in matrices of fewer than 2^32 weights, not 16.
template <class Index>
struct Entry {
  Index index;
  uint32_t key;
};

// Keys are cut into digits of 11, 11 and 10 bits, the highest first.
constexpr int kDigits = 3, kBins = 2048;
constexpr std::array<int, kDigits> kShift = {21, 10, 0};
constexpr std::array<uint32_t, kDigits> kDigitMask = {2047, 2047, 1023};
using Histogram = std::array<int64_t, kBins>;

// Finds the k-th largest key digit by digit. count(digit, prefix, histogram) adds up the digit's values over all keys
// whose higher digits are those of prefix; it returns false to give up.
template <class Count>
bool find_kth_key(int64_t k, Count count, uint32_t* kth) {
  uint32_t prefix = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    Histogram histogram{};
    if (!count(digit, prefix, histogram)) return false;
    uint32_t bin = kDigitMask[digit];
    while (histogram[bin] < k) k -= histogram[bin--];
    prefix |= bin << kShift[digit];
  }
  *kth = prefix;
  return true;
}

bool has_prefix(uint32_t key, int digit, uint32_t prefix) {
  return digit == 0 || key >> kShift[digit - 1] == prefix >> kShift[digit - 1];
}

constexpr int kBlock = 32;  // at one survivor in a thousand, 97 blocks of a hundred are passed over by one test

enum Hit : uint8_t { kNone = 0, kSome = 1, kCareful = 2 };

// hit[b] says whether block b has a score that reaches the threshold, and whether one equals `least` or is not a number.
// Written with a moving pointer: with scores[b * kBlock + i] GCC 12 gathers element by element, at 15 times the cost.
FASTPRUNE_CLONES void mark_blocks(const float* scores, int blocks, float threshold, float least, uint8_t* hit) {
  for (int b = 0; b < blocks; ++b, scores += kBlock) {
    int any = 0, careful = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      any |= !(scores[i] < threshold);
      careful |= scores[i] == least || scores[i] != scores[i];
    }
    hit[b] = static_cast<uint8_t>(!any ? kNone : careful ? kCareful : kSome);
  }
}

template <class Index>
class Selector {
  using Entry = fastprune::Entry<Index>;
  using Entries = std::vector<Entry>;

 public:
  Selector(const ScoreSource& source, int64_t n, int64_t k, int threads)
      : source_(source),
        n_(n),
        k_(k),
        threads_(n < kSerial ? 1 : std::max(threads, 1)),
        sampled_(std::clamp(n / 64 / kRun * kRun, kLeastSampled, kMostSampled)) {}

  int64_t run(int64_t* indices, float* values) {
    Entries entries;
    bool enough;
    if (n_ <= 2 * sampled_ || k_ > n_ / 4) {
      enough = collect(-std::numeric_limits<float>::infinity(), n_, entries);
    } else {
      const float threshold = sampled_threshold();
      enough = collect(threshold, 2 * expected_ + kMostSampled, entries);
    }
    if (!enough || (first_nan_ < 0 && static_cast<int64_t>(entries.size()) < k_)) {
      uint32_t kth;
      first_nan_ = -1;
      if (find_kth_key(k_, [&](int d, uint32_t p, Histogram& h) { return count_matrix(d, p, h); }, &kth)) {
        collect(value_of(kth), n_, entries);
      }
    }
    if (first_nan_ >= 0) return first_nan_;
    if (static_cast<int64_t>(entries.size()) > 2 * k_) cut(entries);  // a few more than k are sorted sooner than cut
    sort(entries);
    for (int64_t i = 0; i < k_; ++i) {
      indices[i] = static_cast<int64_t>(entries[i].index);
      values[i] = value_of(entries[i].key);
    }
    return -1;
  }

 private:
  static constexpr int64_t kSerial = 1 << 16;   // below, starting threads costs as much as they save
  // Scores in the sample, in runs of 16 neighbours, a line of cache each. An element of the sample costs as much as some
  // 20 of the pass, so one in 64; fewer than 4096 would make the threshold too uncertain to be of use.
  static constexpr int64_t kRun = 16, kLeastSampled = 1 << 12, kMostSampled = 1 << 15;

  template <class Visit>
  void visit_tiles(Visit visit) const {
    parallel_ranges(n_, threads_, [&](int part, int64_t begin, int64_t end) {
      alignas(64) float scores[kTile];
      for (; begin < end; begin += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - begin));
        form_scores(source_, begin, count, scores);
        if (!visit(part, begin, count, scores)) return;
      }
    });
  }

  void note_nan(std::vector<int64_t>& first, int part, int64_t index) const {
    if (first[part] < 0) first[part] = index;
  }

  void keep_first_nan(const std::vector<int64_t>& first) {
    first_nan_ = -1;
    for (const int64_t index : first) {
      if (index >= 0 && (first_nan_ < 0 || index < first_nan_)) first_nan_ = index;
    }
  }

  // A score that about expected_ >= k others reach. Positions are drawn, one in each equal stretch of the matrix, since
  // evenly spaced ones could all fall into one column.
  float sampled_threshold() {
    const int64_t runs = sampled_ / kRun, stretch = n_ / runs;
    std::vector<float> sample(sampled_);
    parallel_ranges(runs, sampled_ < kMostSampled ? 1 : threads_, [&](int, int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run) {
        uint64_t bits = static_cast<uint64_t>(run + 1) * 0x9e3779b97f4a7c15u;
        bits ^= bits >> 31;
        const int64_t offset = static_cast<int64_t>(bits % static_cast<uint64_t>(stretch - kRun + 1));
        form_scores(source_, run * stretch + offset, kRun, &sample[run * kRun]);
      }
    });
    for (float& score : sample) {
      if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();  // found by the pass that follows
    }
    // Four standard deviations above the mean, and a little more where the mean is small: in 16.7 M independent scores
    // one selection in ten thousand then needs the slow way; more survivors cost less than that.
    const double mean = static_cast<double>(k_ * sampled_) / static_cast<double>(n_);
    const int64_t rank = std::min<int64_t>(sampled_ - 1, static_cast<int64_t>(mean + 4 * std::sqrt(mean) + 8));
    expected_ = static_cast<int64_t>(static_cast<double>(rank + 1) * static_cast<double>(n_) / static_cast<double>(sampled_));
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<float>());
    return sample[rank];
  }

  // Collects, in the order of their indices, the scores that reach the threshold; of those equal to it no more than the
  // first k of each thread's range, since others cannot be among the k best. False if a thread finds more than `most`;
  // scores that are not numbers are noted.
  bool collect(float least, int64_t most, Entries& entries) {
    std::vector<Entries> found(threads_);
    // Room for what is expected: lists that grow by doubling cost more than all the rest of a small matrix.
    const int64_t room = std::isinf(least) ? n_ : expected_ + expected_ / 8;
    for (Entries& mine : found) mine.reserve(room / threads_ + kBlock);
    std::vector<float> thresholds(threads_, least);
    std::vector<int64_t> ties_left(threads_, k_), nan(threads_, -1);
    std::atomic<bool> enough{true};
    visit_tiles([&](int part, int64_t begin, int count, const float* scores) {
      Entries& mine = found[part];
      float& threshold = thresholds[part];
      uint8_t hit[kTile / kBlock + 1];
      const int blocks = count / kBlock;
      mark_blocks(scores, blocks, threshold, least, hit);
      hit[blocks] = kCareful;
      for (int b = 0; b <= blocks; ++b) {
        if (hit[b] == kNone) continue;
        if (hit[b] == kSome) {  // no branch on a score: among many survivors half of those would be mispredicted
          Entry some[kBlock + 1];
          int n_some = 0;
          for (int64_t i = b * kBlock; i < (b + 1) * kBlock; ++i) {
            some[n_some] = {static_cast<Index>(begin + i), key_of(scores[i])};
            n_some += scores[i] >= threshold;
          }
          mine.insert(mine.end(), some, some + n_some);
          continue;
        }
        for (int i = b * kBlock; i < std::min(count, (b + 1) * kBlock); ++i) {
          if (scores[i] < threshold) continue;
          if (std::isnan(scores[i])) {
            note_nan(nan, part, begin + i);
            return false;
          }
          mine.push_back({static_cast<Index>(begin + i), key_of(scores[i])});
          if (scores[i] == least && --ties_left[part] <= 0) {
            threshold = std::nextafter(least, std::numeric_limits<float>::infinity());
          }
        }
      }
      if (static_cast<int64_t>(mine.size()) <= most) return true;
      enough = false;
      return false;
    });
    keep_first_nan(nan);
    if (!enough || first_nan_ >= 0) return enough;
    entries = std::move(found[0]);
    size_t total = entries.size();
    for (int part = 1; part < threads_; ++part) total += found[part].size();
    entries.reserve(total);
    for (int part = 1; part < threads_; ++part) {
      entries.insert(entries.end(), found[part].begin(), found[part].end());
      Entries().swap(found[part]);
    }
    return true;
  }

  bool count_matrix(int digit, uint32_t prefix, Histogram& histogram) {
    std::vector<Histogram> counts(threads_, Histogram{});
    std::vector<int64_t> nan(threads_, -1);
    visit_tiles([&](int part, int64_t begin, int count, const float* scores) {
      Histogram& mine = counts[part];
      for (int i = 0; i < count; ++i) {
        if (std::isnan(scores[i])) {
          note_nan(nan, part, begin + i);
          return false;
        }
        const uint32_t key = key_of(scores[i]);
        if (has_prefix(key, digit, prefix)) ++mine[key >> kShift[digit] & kDigitMask[digit]];
      }
      return true;
    });
    for (const Histogram& part : counts) {
      for (int bin = 0; bin < kBins; ++bin) histogram[bin] += part[bin];
    }
    keep_first_nan(nan);
    return first_nan_ < 0;
  }

  // Leaves the k best entries, still in the order of their indices.
  void cut(Entries& entries) const {
    if (static_cast<int64_t>(entries.size()) == k_) return;
    uint32_t kth = 0;
    int64_t above = 0;
    find_kth_key(
        k_,
        [&](int digit, uint32_t prefix, Histogram& histogram) {
          for (const Entry& entry : entries) {
            if (has_prefix(entry.key, digit, prefix)) ++histogram[entry.key >> kShift[digit] & kDigitMask[digit]];
          }
          return true;
        },
        &kth);
    for (const Entry& entry : entries) above += entry.key > kth;
    int64_t ties = k_ - above;
    const auto lost = [&](const Entry& entry) { return entry.key < kth || (entry.key == kth && ties-- <= 0); };
    size_t kept = 0;
    for (const Entry& entry : entries) {
      if (!lost(entry)) entries[kept++] = entry;
    }
    entries.resize(kept);
  }

  // By descending key; stable, so that ties stay in the order of their indices.
  static void sort(Entries& entries) {
    Entries other(entries.size());
    for (int digit = kDigits - 1; digit >= 0; --digit) {
      Histogram start{};
      const auto bin = [&](const Entry& entry) { return ~entry.key >> kShift[digit] & kDigitMask[digit]; };
      for (const Entry& entry : entries) ++start[bin(entry)];
      int64_t sum = 0;
      for (int64_t& count : start) {
        const int64_t here = count;
        count = sum;
        sum += here;
      }
      for (const Entry& entry : entries) other[start[bin(entry)]++] = entry;
      entries.swap(other);
    }
  }

  const ScoreSource& source_;
  const int64_t n_, k_;
  const int threads_;
  const int64_t sampled_;
  int64_t expected_ = 0;
  int64_t first_nan_ = -1;
};

// A matrix of so many weights keeps all threads busy; smaller ones, of which sorting takes a larger part, go side by side.
constexpr int64_t kAlone = int64_t{1} << 21;

int64_t select(const Selection& selection, int threads) {
  const auto& [source, n, k, indices, values] = selection;
  if (n <= std::numeric_limits<uint32_t>::max()) return Selector<uint32_t>(source, n, k, threads).run(indices, values);
  return Selector<int64_t>(source, n, k, threads).run(indices, values);
}

}  // namespace

std::vector<int64_t> top_scores(const std::vector<Selection>& selections, int threads) {
  std::vector<int64_t> first_nan(selections.size());
  std::vector<size_t> small;
  for (size_t i = 0; i < selections.size(); ++i) {
    if (selections[i].n < kAlone) small.push_back(i);
  }
  const bool side_by_side = small.size() > 1;
  for (size_t i = 0; i < selections.size(); ++i) {
    if (selections[i].n >= kAlone || !side_by_side) first_nan[i] = select(selections[i], threads);
  }
  if (side_by_side) {
    parallel_items(static_cast<int64_t>(small.size()), threads,
                   [&](int64_t i) { first_nan[small[i]] = select(selections[small[i]], 1); });
  }
  return first_nan;
}

}  // namespace fastprune
