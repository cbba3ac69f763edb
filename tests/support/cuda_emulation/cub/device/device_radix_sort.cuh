// Stands in for CUB's header of this name: the same stable sort of pairs, on the CPU.
#pragma once

#include <cuda_runtime.h>

namespace cub {

template <class T>
struct DoubleBuffer {
  T* d_buffers[2];
  int selector = 0;
  DoubleBuffer(T* current, T* alternate) : d_buffers{current, alternate} {}
  T* Current() const { return d_buffers[selector]; }
  T* Alternate() const { return d_buffers[selector ^ 1]; }
};

struct DeviceRadixSort {
  template <class Key, class Value>
  static cudaError_t SortPairs(void* temporary, size_t& bytes, DoubleBuffer<Key>& keys, DoubleBuffer<Value>& values,
                               uint64_t count, int begin_bit, int end_bit, cudaStream_t) {
    if (temporary == nullptr) {
      bytes = 1 << 10;
      return cudaSuccess;
    }
    std::memset(temporary, 0xa5, bytes);
    std::vector<uint64_t> order(count);
    std::iota(order.begin(), order.end(), uint64_t{0});
    const Key mask = end_bit >= 64 ? ~Key{0} : (Key{1} << end_bit) - 1;
    const auto bits = [&](uint64_t i) { return (keys.Current()[i] & mask) >> begin_bit; };
    std::stable_sort(order.begin(), order.end(), [&](uint64_t a, uint64_t b) { return bits(a) < bits(b); });
    for (uint64_t i = 0; i < count; ++i) {
      keys.Alternate()[i] = keys.Current()[order[i]];
      values.Alternate()[i] = values.Current()[order[i]];
    }
    keys.selector ^= 1;
    values.selector ^= 1;
    return cudaSuccess;
  }
};

}  // namespace cub
