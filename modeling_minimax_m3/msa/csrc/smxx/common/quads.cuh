// Reductions over the four lanes that share a row of an mma accumulator.
#pragma once

#include "ordered_bits.cuh"

namespace msa {

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// NaN if any is.
__device__ __forceinline__ float quad_max_or_nan(float value) {
  value = max_or_nan(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return max_or_nan(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

}  // namespace msa
