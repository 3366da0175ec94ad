// The output of one query head from the partial results of its splits.
#pragma once

#include <cstdint>

#include "config.h"
#include "params.h"
#include "partial_results.cuh"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/matrix.cuh"
#include "smxx/common/ordered_bits.cuh"

namespace msa {

// Volatile, so that the compiler keeps several in flight.
__device__ __forceinline__ void load_columns(float (&data)[4], const float* source) {
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(data[0]), "=f"(data[1]), "=f"(data[2]), "=f"(data[3])
               : "l"(source));
}

// The largest of the lanes' floats; +0 for -0.
__device__ __forceinline__ float warp_max(float value) {
  const uint32_t bits = __reduce_max_sync(0xffffffffu, ordered_bits(value));
  return __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
}

// Two CTAs per (row, token, query head), each with half of the columns, four a lane: the threads
// take 8 or 16 splits at a time. Always summed in the same order.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, 4)
    combine_splits_kernel(const DecodeAttentionParams params, int splits, int q_heads_per_kv) {
  constexpr int kColumns = kHeadDim / 2;
  constexpr int kLanes = kColumns / 4;  // of a split
  constexpr int kRows = kAttentionThreads / kLanes;
  constexpr int kTerms = kMaxSplits / kRows;
  static_assert(kMaxSplits == 32, "one lane a split");
  __shared__ float4 results[kRows][kLanes];
  __shared__ float totals[kRows];

  const int lane = threadIdx.x % 32;
  const int first_split = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 4;
  const int head = blockIdx.z / 2, half = blockIdx.z % 2;
  const PartialResults partial = partial_results(params, splits);
  const int64_t item = int64_t{blockIdx.x} * params.num_kv_heads + blockIdx.y;
  const int64_t first = partial_index(item, 0, head, splits, q_heads_per_kv);
  const float2* softmax = partial.softmax + first + min(lane, splits - 1);
  const float* outputs = partial.outputs + first * kHeadDim + half * kColumns + column;
  const float* sources[kTerms];  // past the last split that one, of weight 0
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    sources[i] = outputs + min(first_split + i * kRows, splits - 1) * kHeadDim;
  }
  const int64_t head_index = item * q_heads_per_kv + head;
  Element* out =
      static_cast<Element*>(params.out) + head_index * kHeadDim + half * kColumns + 2 * threadIdx.x;
  wait_for_previous_kernel(softmax, sources[0], sources[kTerms / 2], sources[kTerms - 1], out);

  float2 pair = *softmax;  // maximum and sum of split `lane`
  float terms[kTerms][4];
#pragma unroll
  for (int i = 0; i < kTerms; ++i) load_columns(terms[i], sources[i]);
  if (lane >= splits) pair = {-INFINITY, 0.0f};

  const float best = warp_max(pair.x);
  const float factor = pair.x == -INFINITY ? 0.0f : exp2_approx(pair.x - best);
  const float part_of_total = factor * pair.y;
  float result[4] = {}, total = 0.0f;
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    const int split = first_split + i * kRows;
    const float weight = __shfl_sync(0xffffffffu, factor, split);
    total += __shfl_sync(0xffffffffu, part_of_total, split);
#pragma unroll
    for (int k = 0; k < 4; ++k) result[k] += weight * terms[i][k];
  }
  results[first_split][threadIdx.x % kLanes] = {result[0], result[1], result[2], result[3]};
  if (column == 0) totals[first_split] = total;
  __syncthreads();

  if (threadIdx.x < kColumns / 2) {
    float sums[2] = {}, sum = 0.0f;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float2 terms_of_row = reinterpret_cast<const float2*>(results[row])[threadIdx.x];
      sums[0] += terms_of_row.x;
      sums[1] += terms_of_row.y;
      sum += totals[row];
    }
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    *reinterpret_cast<uint32_t*>(out) = pack<Element>(sums[0] * inverse, sums[1] * inverse);
  }
}

}  // namespace msa
