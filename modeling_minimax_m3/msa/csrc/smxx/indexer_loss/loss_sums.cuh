// Small kernels of the loss, for one source file only, being no templates in part: the value from
// its terms, the scale of score gradients, the index keys' gradient from its sums.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "config.h"
#include "schedule.h"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"
#include "smxx/common/ordered_bits.cuh"
#include "smxx/forward_kv_major/buckets.cuh"

namespace msa {

// kl and index_lse from the terms of the places. One warp per (query token, head).
__global__ void __launch_bounds__(32 * kCombineRowWarps)
    combine_terms_kernel(const IndexerLossParams params, const IndexerLossSchedule schedule) {
  const ForwardParams& attention = params.attention;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineRowWarps + threadIdx.x / 32;
  const KvSchedule& lists = schedule.lists;
  if (row >= static_cast<int64_t>(lists.token_end - lists.token_begin) * attention.num_kv_heads) {
    return;
  }
  float largest = -INFINITY, sum = 0, cross = 0, mass = 0;
  auto add = [&](float other_largest, float other_sum) {
    const float together = max_or_nan(largest, other_largest);
    if (together == -INFINITY) return;
    sum = sum * exp2_approx(largest - together) + other_sum * exp2_approx(other_largest - together);
    largest = together;
  };
  for (int slot = lane; slot < attention.topk; slot += 32) {
    const int64_t pair = row * attention.topk + slot;
    if (bucket_of_pair(attention, lists, pair) < 0) continue;
    const float4 terms = schedule.terms[pair];
    add(terms.x, terms.y);
    cross += terms.z;
    mass += terms.w;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other_largest = __shfl_xor_sync(0xffffffffu, largest, distance);
    const float other_sum = __shfl_xor_sync(0xffffffffu, sum, distance);
    add(other_largest, other_sum);
    cross += __shfl_xor_sync(0xffffffffu, cross, distance);
    mass += __shfl_xor_sync(0xffffffffu, mass, distance);
  }
  if (lane == 0) {
    const int64_t target = static_cast<int64_t>(lists.token_begin) * attention.num_kv_heads + row;
    const bool empty = largest == -INFINITY;
    const float log2_sum = largest + log2f(sum);
    params.index_lse[target] = empty ? -INFINITY : log2_sum * kLn2;
    params.kl[target] = empty ? 0 : (cross + log2_sum * mass) * kLn2;
  }
}

// grad_index_key from its sums, two channels a thread.
template <typename Element>
__global__ void round_index_key_kernel(const IndexerLossParams params,
                                       const IndexerLossSchedule schedule) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= static_cast<int64_t>(params.attention.total_k) * params.index_dim / 2) return;
  const float2 sums = reinterpret_cast<const float2*>(schedule.index_key_sums)[i];
  const float factor = schedule.factors[1];
  static_cast<uint32_t*>(params.grad_index_key)[i] =
      pack<Element>(sums.x * factor, sums.y * factor);
}

// A power of two that brings the largest |grad_kl| to 2^9, and what takes it out again. One thread
// block. Score gradients are at most twice that, and float16 keeps 2^-24.
__global__ void __launch_bounds__(1024)
    scale_gradients_kernel(const IndexerLossParams params, float* factors) {
  __shared__ float warp_largest[32];
  const int64_t count =
      static_cast<int64_t>(params.attention.total_q) * params.attention.num_kv_heads;
  float largest = 0;
  for (int64_t i = threadIdx.x; i < count; i += 1024) {
    largest = fmaxf(largest, fabsf(params.grad_kl[i]));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 32; ++i) largest = fmaxf(largest, warp_largest[i]);
  const bool scalable = largest > 0 && largest < INFINITY;
  const int exponent = scalable ? min(max(9 - ilogbf(largest), -100), 100) : 0;
  factors[0] = exp2f(static_cast<float>(exponent));
  factors[1] = exp2f(static_cast<float>(-exponent)) * params.index_scale;
}

}  // namespace msa
