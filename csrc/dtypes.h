// Element types of tensors, and their exact conversion to float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

namespace fastprune {

enum class Dtype : int { float32, float64, float16, bfloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class To, class From>
FASTPRUNE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

FASTPRUNE_INLINE float widen(float value) { return value; }
FASTPRUNE_INLINE double widen(double value) { return value; }
FASTPRUNE_INLINE float widen(BFloat value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

// In plain integer arithmetic, so that it needs no F16C; without a branch, so that it vectorises. A subnormal is its
// mantissa times 2^-24, which is exact and meets no float32 subnormal (flush-to-zero would lose those).
FASTPRUNE_INLINE float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + ((127u - 15u) << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t bits = magnitude >= 0x7c00u ? special : magnitude >= 0x0400u ? normal : subnormal;
  return bit_cast<float>(bits | sign);
}

}  // namespace fastprune
