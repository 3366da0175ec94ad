// Products of a few tokens with the rows of a weight matrix, at the rate at which the weights can
// be read. Everything here streams weights from global memory into the operands of mma.m16n8k16.
//
// The order of the k channels of an mma is free as long as both operands agree. So a lane reads 16
// contiguous bytes of weight row g and of token g (g = lane / 4): eight channels, which are its
// part of `b` and of `a` in two mma. Eight weight rows are the n columns, up to 16 tokens the m
// rows. The warps of a thread block share the channels out and add up their sums at the end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "smxx/common/matrix.cuh"

namespace msa::few_tokens {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 8;       // weight rows of an mma
constexpr int kChannels = 32;  // that a group of four lanes reads by one load a lane
constexpr int kLoads = 8;      // of 16 bytes of weights, in flight in a lane

// Thread blocks that fit a multiprocessor: enough for the bytes in flight, few enough for the
// registers.
constexpr int thread_blocks_per_sm(int halves, int tiles) {
  return halves * tiles == 1 ? 4 : 3;
}

// 16 bytes of weights, which are read once.
__device__ __forceinline__ uint4 load_weights(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// 16 bytes that a kernel before has written. Each thread block reads them once, so that they need
// no place in the first-level cache.
__device__ __forceinline__ uint4 load_states(const void* address) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

// sums += tokens * weights over 32 channels: tokens g and g + 8, weight row g.
template <typename Element>
__device__ __forceinline__ void add_products(float (&sums)[4], const uint4& low, const uint4& high,
                                             const uint4& weights) {
  const uint32_t first[4] = {low.x, high.x, low.y, high.y};
  const uint32_t second[4] = {low.z, high.z, low.w, high.w};
  multiply_add<Element>(sums, first, weights.x, weights.y);
  multiply_add<Element>(sums, second, weights.z, weights.w);
}

// The sums of all warps for kTiles tiles of eight weight rows and kHalves halves of eight tokens.
template <int kHalves, int kTiles>
struct WarpSums {
  static constexpr int kTokens = 8 * kHalves;
  static constexpr int kColumns = kRows * kTiles;
  float values[kWarps][kTokens][kColumns];

  __device__ void store(const float (&sums)[kTiles][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int token = lane / 4, column = 2 * (lane % 4);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        float* row = &values[warp][token + 8 * half][kRows * tile + column];
        row[0] = sums[tile][2 * half];
        row[1] = sums[tile][2 * half + 1];
      }
    }
  }

  __device__ float total(int token, int column) const {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += values[warp][token][column];
    return sum;
  }
};

template <typename Element>
__device__ __forceinline__ Element to_element(float value) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

}  // namespace msa::few_tokens
