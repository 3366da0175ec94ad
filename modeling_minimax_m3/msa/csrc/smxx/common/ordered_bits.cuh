// Floats as unsigned integers of the same order, NaN above all, and (score, id) as one 64-bit key.
#pragma once

#include <cstdint>

namespace msa {

// The larger one, NaN if either is: fmaxf would return the other. It takes one instruction as well.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// Monotone: a < b gives ordered_bits(a) < ordered_bits(b); -0 and +0 give the same bits,
// and so does every NaN, as the addition leaves one of them only: the largest.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// The larger key is the better block: higher score first, then lower id. Never 0 for a number.
__device__ __forceinline__ uint64_t rank_key(float score, int id) {
  return static_cast<uint64_t>(ordered_bits(score)) << 32 | ~static_cast<uint32_t>(id);
}

__device__ __forceinline__ int rank_key_id(uint64_t key) {
  return static_cast<int>(~static_cast<uint32_t>(key));
}

}  // namespace msa
