// The teacher: the main attention's probabilities, averaged over the query heads of a key/value
// head.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "operands.cuh"
#include "pairs.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"

namespace msa {

// 16 rows of queries of the warp's pairs: row r of tile i is head (16 i + r) % group of pair (16 i
// + r) / group.
template <int kHeadDim>
struct TeacherRows {
  uint4 low[kHeadDim / 32];   // row lane / 4
  uint4 high[kHeadDim / 32];  // row lane / 4 + 8
  float lse[2];               // of these rows; infinite where there is no such pair
};

template <typename Element, int kHeadDim>
__device__ __forceinline__ void load_teacher_rows(TeacherRows<kHeadDim>& rows,
                                                  const ForwardParams& params, int tokens,
                                                  int kv_head, int q_heads_per_kv, int tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile * 16 + half * 8 + lane / 4;
    const int place = row / q_heads_per_kv;
    const int token = __shfl_sync(0xffffffffu, tokens, place % 8);
    const bool valid = place < IndexerLossConfig::kWarpPairs && token >= 0;
    const int64_t head = kv_head * q_heads_per_kv + row % q_heads_per_kv;
    const Element* query = static_cast<const Element*>(params.query) +
                           max(token, 0) * params.query_token_stride +
                           head * params.query_head_stride + lane % 4 * 8;
    load_row(half == 0 ? rows.low : rows.high, query, valid ? kHeadDim / 32 : 0);
    const float* lse = params.lse + static_cast<int64_t>(max(token, 0)) * params.num_heads + head;
    rows.lse[half] = valid ? *lse : INFINITY;
  }
}

// What makes a mean probability of a score in units of log2. Not where rows are loaded, which would
// wait for them there.
__device__ __forceinline__ float probability_offset(float lse, int q_heads_per_kv) {
  return lse * kLog2E + log2f(static_cast<float>(q_heads_per_kv));
}

// Adds 8 values of every lane over the min(kQHeadsPerKv, 8) rows of a pair. Value j is column
// j / 2 * 8 + lane % 4 * 2 + j % 2 of row lane / 4. What is left of a pair's 32 columns is spread
// over its lanes: the first 8 / min(kQHeadsPerKv, 8) values, from value `begin` on.
template <int kQHeadsPerKv>
__device__ __forceinline__ int add_rows(float (&values)[8]) {
  const int lane = threadIdx.x % 32;
  int begin = 0;
#pragma unroll
  for (int rows = 1, count = 4; rows < kQHeadsPerKv && rows < 8; rows *= 2, count /= 2) {
    const bool upper = lane & (4 * rows);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float sent = upper ? values[i] : values[i + count];
      const float kept = upper ? values[i + count] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, 4 * rows);
    }
    if (upper) begin += count;
  }
  return begin;
}

// The scores of 32 keys (accumulators of four n8 tiles) as mean probabilities, to `target`: row of
// the warp's first pair, column of the first of these keys.
template <int kQHeadsPerKv>
__device__ __forceinline__ void store_probabilities(float* target, int row_floats,
                                                    const float (&scores)[16], float scale_log2,
                                                    const float (&offset)[2], int tile) {
  const int lane = threadIdx.x % 32;
  float values[2][8];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int half = i / 2 % 2;
    values[half][i / 4 * 2 + i % 2] = exp2_approx(scores[i] * scale_log2 - offset[half]);
  }
  if constexpr (kQHeadsPerKv == 16) {
#pragma unroll
    for (int j = 0; j < 8; ++j) values[0][j] += values[1][j];
  }
  constexpr int kLeft = kQHeadsPerKv >= 8 ? 1 : 8 / kQHeadsPerKv;
#pragma unroll
  for (int half = 0; half < (kQHeadsPerKv == 16 ? 1 : 2); ++half) {
    const int begin = add_rows<kQHeadsPerKv>(values[half]);
    const int pair = (tile * 16 + half * 8 + lane / 4) / kQHeadsPerKv;
    if (pair >= IndexerLossConfig::kWarpPairs) break;  // one head per key/value head: half a tile
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const int value = begin + i;
      target[pair * row_floats + value / 2 * 8 + lane % 4 * 2 + value % 2] = values[half][i];
    }
  }
}

}  // namespace msa
