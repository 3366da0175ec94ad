// Adds up a query's partial outputs, each weighted by its share of the softmax sum.
//
// One warp per (query token, key/value head); a lane keeps the fragment of partial_attention.cuh.
// The slots are added in their order, so that results repeat bit for bit.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "../../common/matrix.cuh"
#include "../../params.h"
#include "buckets.cuh"
#include "config.h"
#include "schedule.h"

namespace msa::sm80 {

constexpr int kCombineWarps = 4;

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_partials_kernel(const ForwardParams params, const KvSchedule schedule) {
  constexpr int kVectors = kHeadDim / 16;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / 32;
  if (row >=
          static_cast<int64_t>(schedule.token_end - schedule.token_begin) * params.num_kv_heads ||
      is_idle(schedule)) {
    return;
  }
  const int64_t first_pair = row * params.topk;
  const int token = schedule.token_begin + static_cast<int>(row / params.num_kv_heads);
  const int kv_head = static_cast<int>(row % params.num_kv_heads);
  if (is_query_major(params, schedule, token, kv_head)) return;

  // Slots without a visible block were never written: a bit each for those that were.
  uint64_t written = 0;
  for (int base = 0; base < params.topk; base += 32) {
    const int slot = base + lane;
    const bool is_written =
        slot < params.topk && bucket_of_pair(params, schedule, first_pair + slot) >= 0;
    written |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, is_written)) << base;
  }

  const float* lse = schedule.partial_lse + first_pair * kGroup + lane / 4;
  float largest[2] = {-INFINITY, -INFINITY};
  for (int slot = 0; slot < params.topk; ++slot) {
    if ((written >> slot & 1) == 0) continue;
    largest[0] = fmaxf(largest[0], lse[slot * kGroup]);
    largest[1] = fmaxf(largest[1], lse[slot * kGroup + 8]);
  }

  float sum[2] = {0, 0};
  float out[kVectors][8] = {};
  const uint4* source =
      static_cast<const uint4*>(schedule.partial_out) + first_pair * (kGroup * kHeadDim / 8) + lane;
  auto load = [&](uint4(&vectors)[kVectors], int slot) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      vectors[i] = __ldcs(source + slot * (kGroup * kHeadDim / 8) + i * 32);
    }
  };
  auto add = [&](const uint4(&vectors)[kVectors], int slot) {
    const float weight[2] = {exp2_approx(lse[slot * kGroup] - largest[0]),
                             exp2_approx(lse[slot * kGroup + 8] - largest[1])};
    sum[0] += weight[0];
    sum[1] += weight[1];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t words[4] = {vectors[i].x, vectors[i].y, vectors[i].z, vectors[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 values = unpack<Element>(words[j]);
        out[i][2 * j] += weight[j % 2] * values.x;
        out[i][2 * j + 1] += weight[j % 2] * values.y;
      }
    }
  };
  auto next_slot = [&](int slot) {
    do {
      ++slot;
    } while (slot < params.topk && (written >> slot & 1) == 0);
    return slot;
  };
  // Two slots at a time, so that the loads of one overlap the sums of the other.
  int slot = next_slot(-1);
  while (slot < params.topk) {
    const int second = next_slot(slot);
    uint4 first_vectors[kVectors], second_vectors[kVectors];
    load(first_vectors, slot);
    if (second < params.topk) load(second_vectors, second);
    add(first_vectors, slot);
    if (second < params.topk) add(second_vectors, second);
    slot = next_slot(second);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t head =
        static_cast<int64_t>(token) * params.num_heads + kv_head * kGroup + half * 8 + lane / 4;
    const float inverse = written == 0 ? 0 : 1 / sum[half];
    uint32_t* target = reinterpret_cast<uint32_t*>(params.out) + head * (kHeadDim / 2) + lane % 4;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        target[i * 8 + j * 4] = pack<Element>(out[i][4 * j + 2 * half] * inverse,
                                              out[i][4 * j + 2 * half + 1] * inverse);
      }
    }
    if (lane % 4 == 0) {
      constexpr float kLn2 = 0.693147180559945309f;
      params.lse[head] = written == 0 ? -INFINITY : (largest[half] + log2f(sum[half])) * kLn2;
    }
  }
}

}  // namespace msa::sm80
