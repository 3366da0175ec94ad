// The output of one query head from the partial results of its splits.
#pragma once

#include <cstdint>

#include "../../common/matrix.cuh"
#include "../../params.h"
#include "config.h"
#include "dependent_launch.cuh"
#include "split_attention.cuh"

namespace msa::sm80::decode {

// Volatile, so that the compiler keeps several in flight.
__device__ __forceinline__ void load_columns(float (&data)[4], const float* source) {
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(data[0]), "=f"(data[1]), "=f"(data[2]), "=f"(data[3])
               : "l"(source));
}

__device__ __forceinline__ void load_columns(float (&data)[2], const float* source) {
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];\n" : "=f"(data[0]), "=f"(data[1]) : "l"(source));
}

// One CTA per (row, token, query head); its warps take the splits in turn, a lane kHeadDim / 32
// columns. Always summed in the same order.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, 4)
    combine_splits_kernel(const DecodeAttentionParams params, int splits, int num_group_heads) {
  constexpr int kColumns = kHeadDim / 32;
  constexpr int kTerms = kMaxSplits / kAttentionWarps;
  static_assert(kMaxSplits == 32, "one lane a split");
  __shared__ float results[kAttentionWarps][kHeadDim];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PartialResults partial = partial_results(params, splits);
  const int64_t item = int64_t{blockIdx.x} * params.num_kv_heads + blockIdx.y;
  const int64_t first = item * splits * num_group_heads + blockIdx.z;
  const float2* softmax = partial.softmax + first;
  const float* outputs = partial.outputs + first * kHeadDim + lane * kColumns;
  wait_for_previous_kernel(softmax + lane * num_group_heads, outputs);

  float2 pair{-INFINITY, 0.0f};  // maximum and sum of split `lane`
  if (lane < splits) pair = softmax[lane * num_group_heads];
  // The outputs are requested before the weights are known; those past the last split weigh 0.
  float terms[kTerms][kColumns];
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    const int split = min(warp + i * kAttentionWarps, splits - 1);
    load_columns(terms[i], outputs + split * num_group_heads * kHeadDim);
  }

  float best = pair.x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, distance));
  }
  const float factor = pair.x == -INFINITY ? 0.0f : exp2_approx(pair.x - best);
  float total = factor * pair.y;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, distance);
  }
  float result[kColumns] = {};
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    const float weight = __shfl_sync(0xffffffffu, factor, warp + i * kAttentionWarps);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) result[k] += weight * terms[i][k];
  }
#pragma unroll
  for (int k = 0; k < kColumns; ++k) results[warp][lane * kColumns + k] = result[k];
  __syncthreads();

  if (threadIdx.x < kHeadDim / 2) {
    const int column = 2 * threadIdx.x;
    float sums[2] = {};
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      sums[0] += results[w][column];
      sums[1] += results[w][column + 1];
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    Element* out = static_cast<Element*>(params.out) +
                   (item * num_group_heads + blockIdx.z) * kHeadDim + column;
    *reinterpret_cast<uint32_t*>(out) = pack<Element>(sums[0] * inverse, sums[1] * inverse);
  }
}

}  // namespace msa::sm80::decode
