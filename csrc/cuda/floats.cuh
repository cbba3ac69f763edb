// Floats as the bits that are sorted, widened and rounded. Everything is plain integer arithmetic and correctly rounded
// single operations: no compiler option and no contraction can change a bit, so every backend agrees.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastprune::cuda {

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float magnitude(float a) { return fabsf(a); }
__device__ __forceinline__ double magnitude(double a) { return fabs(a); }

__device__ __forceinline__ float widen_bfloat16(uint32_t bits) { return __uint_as_float(bits << 16); }

// Without a branch. A subnormal is its mantissa times 2^-24, which is exact.
__device__ __forceinline__ float widen_float16(uint32_t bits) {
  const uint32_t size = bits & 0x7fffu;
  const uint32_t normal = (size << 13) + ((127u - 15u) << 23);
  const uint32_t special = (size << 13) | 0x7f800000u;
  const uint32_t subnormal = __float_as_uint(multiply(static_cast<float>(size), 0x1p-24f));
  const uint32_t widened = size >= 0x7c00u ? special : size >= 0x0400u ? normal : subnormal;
  return __uint_as_float(widened | (bits & 0x8000u) << 16);
}

// To nearest, ties to even, of a value that is a number.
__device__ __forceinline__ uint16_t round_to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ uint16_t round_to_float16(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520, half way to what would follow 65504
  if (size < 0x38800000u) {  // below 2^-14 the steps are 2^-24, which are those of float32 from 0.5 on
    return static_cast<uint16_t>(sign | (__float_as_uint(__fadd_rn(__uint_as_float(size), 0.5f)) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13));
}

// The place of a score in descending order: a higher score has a lower rank. -0 does not occur.
__device__ __forceinline__ uint32_t rank_of(float score) {
  const uint32_t bits = __float_as_uint(score);
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

__device__ __forceinline__ float score_of(uint32_t rank) {
  return __uint_as_float(rank & 0x80000000u ? rank : ~rank & 0x7fffffffu);
}

__device__ __forceinline__ bool is_nan(float value) { return !(value == value); }

}  // namespace fastprune::cuda
