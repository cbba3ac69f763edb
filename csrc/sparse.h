// Reading and writing single elements of a weight. Elements are moved as bits, so a NaN keeps its payload and -0 its sign.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastprune {

template <class Bits>
void gather(const Bits* from, const int64_t* offsets, int64_t count, Bits* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[offsets[i]];
}

template <class Bits>
void scatter(Bits* to, const int64_t* offsets, int64_t count, const Bits* from) {
  for (int64_t i = 0; i < count; ++i) to[offsets[i]] = from[i];
}

}  // namespace fastprune
