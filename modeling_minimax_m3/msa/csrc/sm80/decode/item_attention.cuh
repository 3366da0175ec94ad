// What the two attention kernels for a cache share: which item a CTA has, its queries as operands,
// their products with 16 keys a warp.
#pragma once

#include <cstdint>

#include "params.h"
#include "smxx/common/matrix.cuh"
#include "smxx/common/quads.cuh"
#include "smxx/decode/cache_rows.cuh"
#include "smxx/decode/config.h"

namespace msa::sm80 {

// A CTA's share of one (row, token, key/value head). The grid spares the divisions that one linear
// index would take.
struct AttentionItem {
  int kv_head = blockIdx.y;
  int split = blockIdx.z;
  int splits = gridDim.z;
  int batch_row;
  int token;
  int64_t number;

  __device__ __forceinline__ explicit AttentionItem(const DecodeAttentionParams& params) {
    const int token_row = blockIdx.x;
    batch_row = params.num_new == 1 ? token_row : token_row / params.num_new;
    token = token_row - batch_row * params.num_new;
    number = int64_t{token_row} * params.num_kv_heads + kv_head;
  }

  // The queries of the key/value head, from this lane's channels on.
  template <typename Element>
  __device__ __forceinline__ const Element* query(const DecodeAttentionParams& params,
                                                  int q_heads_per_kv, int part) const {
    return static_cast<const Element*>(params.query) + batch_row * params.query_batch_stride +
           token * params.query_token_stride +
           int64_t{kv_head} * q_heads_per_kv * params.query_head_stride + 8 * part;
  }
};

// Brings the queries near; `query` is the lane's.
template <int kHeadDim, typename Element>
__device__ __forceinline__ void prefetch_queries(const Element* query, int64_t head_stride,
                                                 int q_heads_per_kv, int part) {
  constexpr int kLinesPerHead = kHeadDim / 64;
  if (threadIdx.x < q_heads_per_kv * kLinesPerHead) {
    prefetch_line(query - 8 * part + threadIdx.x / kLinesPerHead * head_stride +
                  threadIdx.x % kLinesPerHead * 64);
  }
}

// A warp's share of the queries on their way to shared memory, where they are `a` operands.
template <int kHeadDim>
struct QueryShare {
  static constexpr int kSteps = kHeadDim / 16 / kAttentionWarps;
  uint2 parts[kSteps][2] = {};

  template <typename Element>
  __device__ __forceinline__ void load(const Element* query, int64_t head_stride,
                                       int q_heads_per_kv, int warp, int group_row) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = warp + i * kAttentionWarps;
      const int channel = step / 2 * 32 + 4 * (step % 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int head = group_row + 8 * half;
        if (head < q_heads_per_kv) {
          parts[i][half] = *reinterpret_cast<const uint2*>(query + head * head_stride + channel);
        }
      }
    }
  }

  __device__ __forceinline__ void store(uint4 (&queries)[kHeadDim / 16][32], int warp,
                                        int lane) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      queries[warp + i * kAttentionWarps][lane] = {parts[i][0].x, parts[i][1].x, parts[i][0].y,
                                                   parts[i][1].y};
    }
  }
};

// Scores of the query heads with keys group_row and group_row + 8 of 16.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void multiply_keys(float (&score)[2][4],
                                              const uint4 (&queries)[kHeadDim / 16][32],
                                              const uint4 (&keys)[2][kHeadDim / 32], int lane) {
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 a = queries[2 * j + half][lane];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint4 b = keys[tile][j];
        multiply_add<Element>(score[tile], {a.x, a.y, a.z, a.w}, half == 0 ? b.x : b.z,
                              half == 0 ? b.y : b.w);
      }
    }
  }
}

// A lane's keys of the 16 from `first` on: 2 part, 2 part + 1 and, in the second tile, 8 more.
// Those after `last` are not attended to.
__device__ __forceinline__ bool is_attended(int first, int tile, int k, int part, int last) {
  return first + 8 * tile + 2 * part + k % 2 <= last;
}

// Scores in units of log2, and the largest of each head that this lane has.
__device__ __forceinline__ void scale_scores(float (&score)[2][4], float (&best)[2], float scale,
                                             int part, int first, int last) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      score[tile][k] = is_attended(first, tile, k, part, last) ? score[tile][k] * scale : -INFINITY;
      best[k / 2] = fmaxf(best[k / 2], score[tile][k]);
    }
  }
}

// Scores become weights, whose sums of this lane are added to `sum`. A masked key has weight 0 also
// while every score so far is -inf.
__device__ __forceinline__ void weigh_scores(float (&score)[2][4], float (&sum)[2],
                                             const float (&reference)[2], int part, int first,
                                             int last) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      score[tile][k] = is_attended(first, tile, k, part, last)
                           ? exp2_approx(score[tile][k] - reference[k / 2])
                           : 0.0f;
      sum[k / 2] += score[tile][k];
    }
  }
}

}  // namespace msa::sm80
