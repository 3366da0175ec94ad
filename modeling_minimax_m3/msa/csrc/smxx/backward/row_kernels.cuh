// What comes before and after the main kernel: row by row, bound by memory.
#pragma once

#include <cuda_runtime.h>

#include "params.h"
#include "schedule.h"
#include "smxx/common/matrix.cuh"
#include "smxx/forward_kv_major/buckets.cuh"

namespace msa {

constexpr int kRowThreads = 256;

template <typename Element>
__device__ __forceinline__ void unpack_vector(float (&values)[8], const uint4& vector) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<Element>(words[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// delta = sum over channels of out * grad_out; a row for kHeadDim / 8 lanes.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads)
    output_products_kernel(const BackwardParams params, float* delta) {
  constexpr int kLanes = kHeadDim / 8;
  const ForwardParams& forward = params.forward;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kRowThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool valid = row < static_cast<int64_t>(forward.total_q) * forward.num_heads;
  float sum = 0;
  if (valid) {
    const int64_t token = row / forward.num_heads;
    const int64_t head = row % forward.num_heads;
    float out[8], grad[8];
    unpack_vector<Element>(out,
                           __ldcs(static_cast<const uint4*>(forward.out) + row * kLanes + lane));
    unpack_vector<Element>(
        grad, *reinterpret_cast<const uint4*>(static_cast<const Element*>(params.grad_out) +
                                              token * params.grad_out_token_stride +
                                              head * params.grad_out_head_stride + lane * 8));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += out[i] * grad[i];
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (valid && lane == 0) delta[row] = sum;
}

// Adds up the partial gradients of a (query token, key/value head) of the part, place by place, and
// puts the channels in order; by all lanes of a warp.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void add_query_gradients(const BackwardParams& params,
                                                    const BackwardSchedule& schedule, int row,
                                                    int lane) {
  constexpr int kRowVectors = kHeadDim / 8;
  constexpr int kLoads = 8;  // in flight
  const ForwardParams& forward = params.forward;
  const KvSchedule& lists = schedule.lists;
  const int64_t first_pair = static_cast<int64_t>(row) * forward.topk;

  // Slots without a visible block were never written: a bit each for those that were.
  uint64_t written = 0;
  for (int base = 0; base < forward.topk; base += 32) {
    const int slot = base + lane;
    const bool is_written =
        slot < forward.topk && bucket_of_pair(forward, lists, first_pair + slot) >= 0;
    written |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, is_written)) << base;
  }

  const int pair_vectors = kRowVectors << schedule.q_heads_shift;
  const int64_t first_head =
      static_cast<int64_t>(lists.token_begin + row / forward.num_kv_heads) * forward.num_heads +
      (row % forward.num_kv_heads << schedule.q_heads_shift);
  const uint4* source =
      static_cast<const uint4*>(schedule.partial_grad_query) + first_pair * pair_vectors;
  for (int vector = lane; vector < pair_vectors; vector += 32) {
    float sums[8] = {};
    uint64_t slots = written;
    while (slots != 0) {
      uint4 loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        loaded[i] = make_uint4(0, 0, 0, 0);
        if (slots != 0) loaded[i] = __ldcs(source + (__ffsll(slots) - 1) * pair_vectors + vector);
        slots &= slots - 1;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        float values[8];
        unpack_vector<Element>(values, loaded[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[j] += values[j];
      }
    }
    // Vector 4 i + q of a row holds channels 32 i + 8 n + 2 q and the next, n = 0..3.
    const int64_t head = first_head + vector / kRowVectors;
    uint32_t* target = static_cast<uint32_t*>(params.grad_query) + head * (kHeadDim / 2) +
                       vector % kRowVectors / 4 * 16 + vector % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) target[i * 4] = pack<Element>(sums[2 * i], sums[2 * i + 1]);
  }
}

// The rows of a part.
__host__ __device__ inline int query_gradient_rows(const BackwardParams& params,
                                                   const BackwardSchedule& schedule) {
  return (schedule.lists.token_end - schedule.lists.token_begin) * params.forward.num_kv_heads;
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kRowThreads)
    add_query_gradients_kernel(const BackwardParams params, const BackwardSchedule schedule) {
  const int row = static_cast<int>(blockIdx.x * (kRowThreads / 32) + threadIdx.x / 32);
  if (row >= query_gradient_rows(params, schedule)) return;
  add_query_gradients<Element, kHeadDim>(params, schedule, row, threadIdx.x % 32);
}

// The sums over all queries, rounded; eight values a thread.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads)
    round_gradients_kernel(const float* source, void* target, int64_t num_vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= num_vectors) return;
  const float4 low = __ldcs(reinterpret_cast<const float4*>(source) + 2 * i);
  const float4 high = __ldcs(reinterpret_cast<const float4*>(source) + 2 * i + 1);
  static_cast<uint4*>(target)[i] =
      make_uint4(pack<Element>(low.x, low.y), pack<Element>(low.z, low.w),
                 pack<Element>(high.x, high.y), pack<Element>(high.z, high.w));
}

}  // namespace msa
