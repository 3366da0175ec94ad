// Adds up a query's partial outputs, each weighted by its share of the softmax sum.
//
// A warp takes one half of the channels of a (query token, key/value head); a lane keeps the
// fragment that schedule.h describes. The places are added in their order, so that results repeat
// bit for bit.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "buckets.cuh"
#include "config.h"
#include "params.h"
#include "schedule.h"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"

namespace msa {

constexpr int kCombineWarps = 4;
constexpr int kCombineHalves = 2;

// Pieces of work for a warp that a part has.
__host__ __device__ inline int combine_pieces(const ForwardParams& params,
                                              const KvSchedule& schedule) {
  return (schedule.token_end - schedule.token_begin) * params.num_kv_heads * kCombineHalves;
}

// One piece, by all lanes of a warp.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void combine_piece(const ForwardParams& params,
                                              const KvSchedule& schedule, int piece, int lane) {
  constexpr int kVectors = kHeadDim / 16 / kCombineHalves;
  constexpr int kSlots = 4;                                  // whose loads are in flight together
  constexpr int kPairVectors = kQHeadsPerKv * kHeadDim / 8;  // 16-byte vectors of a pair
  const int row = piece / kCombineHalves;
  const int first_vector = piece % kCombineHalves * kVectors;
  const int64_t first_pair = static_cast<int64_t>(row) * params.topk;
  const int token = schedule.token_begin + row / params.num_kv_heads;
  const int kv_head = row % params.num_kv_heads;
  if (is_query_major(params, schedule, token, kv_head)) return;

  // Slots without a visible block were never written: a bit each for those that were.
  uint64_t written = 0;
  for (int base = 0; base < params.topk; base += 32) {
    const int slot = base + lane;
    const bool is_written =
        slot < params.topk && bucket_of_pair(params, schedule, first_pair + slot) >= 0;
    written |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, is_written)) << base;
  }

  const float* lse = schedule.partial_lse + first_pair * kQHeadsPerKv + lane / 4;
  float largest[2] = {-INFINITY, -INFINITY};
  for (uint64_t left = written; left != 0; left &= left - 1) {
    const int slot = __ffsll(static_cast<long long>(left)) - 1;
    largest[0] = fmaxf(largest[0], lse[slot * kQHeadsPerKv]);
    largest[1] = fmaxf(largest[1], lse[slot * kQHeadsPerKv + 8]);
  }

  float sum[2] = {0, 0};
  float out[kVectors][8] = {};
  const uint4* source = static_cast<const uint4*>(schedule.partial_out) +
                        first_pair * kPairVectors + first_vector * 32 + lane;
#pragma unroll 1
  for (uint64_t left = written; left != 0;) {
    int slots[kSlots];
    uint4 vectors[kSlots][kVectors];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      slots[i] = __ffsll(static_cast<long long>(left)) - 1;
      left &= left - 1;
      if (slots[i] < 0) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        vectors[i][v] = __ldcs(source + slots[i] * kPairVectors + v * 32);
      }
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (slots[i] < 0) continue;
      const float weight[2] = {exp2_approx(lse[slots[i] * kQHeadsPerKv] - largest[0]),
                               exp2_approx(lse[slots[i] * kQHeadsPerKv + 8] - largest[1])};
      sum[0] += weight[0];
      sum[1] += weight[1];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t words[4] = {vectors[i][v].x, vectors[i][v].y, vectors[i][v].z,
                                   vectors[i][v].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 values = unpack<Element>(words[j]);
          out[v][2 * j] += weight[j % 2] * values.x;
          out[v][2 * j + 1] += weight[j % 2] * values.y;
        }
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t head = static_cast<int64_t>(token) * params.num_heads + kv_head * kQHeadsPerKv +
                         half * 8 + lane / 4;
    const float inverse = written == 0 ? 0 : 1 / sum[half];
    uint32_t* target = reinterpret_cast<uint32_t*>(params.out) + head * (kHeadDim / 2) +
                       first_vector * 8 + lane % 4;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        target[i * 8 + j * 4] = pack<Element>(out[i][4 * j + 2 * half] * inverse,
                                              out[i][4 * j + 2 * half + 1] * inverse);
      }
    }
    if (lane % 4 == 0 && first_vector == 0) {
      params.lse[head] = written == 0 ? -INFINITY : (largest[half] + log2f(sum[half])) * kLn2;
    }
  }
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_partials_kernel(const ForwardParams params, const KvSchedule schedule) {
  const int piece = static_cast<int>(blockIdx.x * kCombineWarps + threadIdx.x / 32);
  if (piece >= combine_pieces(params, schedule) || is_idle(schedule)) return;
  combine_piece<Element, kHeadDim>(params, schedule, piece, threadIdx.x % 32);
}

}  // namespace msa
