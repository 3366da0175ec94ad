// The student: the indexer's scores of eight pairs, and what the value and the gradient take from
// them and the teacher's probabilities.
//
// Scores are computed transposed, keys x pairs, so that eight pairs fill a tile: element
// [m][2 h + e] of a lane is key 16 m + 8 h + lane / 4 of pair lane % 4 * 2 + e. They are in units
// of log2.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "operands.cuh"
#include "pairs.cuh"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"
#include "smxx/common/ordered_bits.cuh"

namespace msa {

using IndexRow = uint4[IndexerLossConfig::kMaxIndexDim / 32];
using IndexScores = float[IndexerLossConfig::kMaxBlockSize / 16][4];

// Pair lane / 4's index query.
template <typename Element>
__device__ __forceinline__ void load_index_query(IndexRow& row, const IndexerLossParams& params,
                                                 int tokens, int kv_head, int index_dim) {
  const int lane = threadIdx.x % 32;
  const int token = __shfl_sync(0xffffffffu, tokens, lane / 4);
  const Element* query = static_cast<const Element*>(params.index_query) +
                         max(token, 0) * params.index_query_token_stride +
                         kv_head * params.index_query_head_stride + lane % 4 * 8;
  load_row(row, query, token >= 0 ? index_dim / 32 : 0);
}

// What the last step needs to know of pairs lane % 4 * 2 and the next, besides their scores.
struct StudentPairs {
  int pair[2];         // of the value
  float index_lse[2];  // of the gradient
  float grad_kl[2];    // of the gradient
};

// Of the warp's pairs, which are `first` to `first + 7` of the tile.
template <bool kGradient>
__device__ __forceinline__ void load_student_pairs(StudentPairs& pairs,
                                                   const IndexerLossParams& params,
                                                   const IndexerLossSchedule& schedule,
                                                   const KvTile& tile, int first, int tokens) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if constexpr (kGradient) {
      const int token = __shfl_sync(0xffffffffu, tokens, lane % 4 * 2 + e);
      const int64_t row =
          static_cast<int64_t>(max(token, 0)) * params.attention.num_kv_heads + tile.kv_head;
      pairs.index_lse[e] = params.index_lse[row];
      pairs.grad_kl[e] = params.grad_kl[row];
    } else {
      pairs.pair[e] = load_pair(schedule, tile, first + lane % 4 * 2 + e);
    }
  }
}

// Keys that a pair does not see score -inf.
template <typename Element>
__device__ __forceinline__ void index_scores(IndexScores& scores, const IndexRow& query,
                                             uint32_t keys_address, const KvTile& tile, int tokens,
                                             float scale_log2, int block_size, int index_dim) {
  const int lane = threadIdx.x % 32;
  const uint32_t address = keys_address + swizzled_offset<8>(lane & 15, lane >> 4);
  int last_key[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    last_key[e] = last_visible_key(tile, __shfl_sync(0xffffffffu, tokens, lane % 4 * 2 + e));
  }
#pragma unroll
  for (int m = 0; m < IndexerLossConfig::kMaxBlockSize / 16; ++m) {
    if (m == 4 && block_size == 64) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[m][i] = 0;
#pragma unroll
    for (int step = 0; step < IndexerLossConfig::kMaxIndexDim / 16; ++step) {
      if (step == 4 && index_dim == 64) break;
      uint32_t a[4];
      load_matrix_x4(a, (address + step / 4 * block_size * 128 + m * 2048) ^ (step % 4 * 32));
      const uint4& words = query[step / 2];
      multiply_add<Element>(scores[m], a, step % 2 == 0 ? words.x : words.z,
                            step % 2 == 0 ? words.y : words.w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool visible = m * 16 + i / 2 * 8 + lane / 4 <= last_key[i % 2];
      scores[m][i] = visible ? scores[m][i] * scale_log2 : -INFINITY;
    }
  }
}

// The value's sums of the warp's pairs, see IndexerLossSchedule::terms.
__device__ __forceinline__ void store_terms(float4* terms, const IndexScores& scores,
                                            const float* probabilities, const int (&pair)[2],
                                            int block_size) {
  const int lane = threadIdx.x % 32;
  const int row_floats = IndexerLossConfig::row_floats(block_size);
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int m = 0; m < IndexerLossConfig::kMaxBlockSize / 16; ++m) {
    if (m == 4 && block_size == 64) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i % 2] = max_or_nan(largest[i % 2], scores[m][i]);
  }
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    largest[0] = max_or_nan(largest[0], __shfl_xor_sync(0xffffffffu, largest[0], distance));
    largest[1] = max_or_nan(largest[1], __shfl_xor_sync(0xffffffffu, largest[1], distance));
  }
  float sum[2] = {}, cross[2] = {}, mass[2] = {};
#pragma unroll
  for (int m = 0; m < IndexerLossConfig::kMaxBlockSize / 16; ++m) {
    if (m == 4 && block_size == 64) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = i % 2;
      const float score = scores[m][i];
      const float p =
          probabilities[(lane % 4 * 2 + e) * row_floats + m * 16 + i / 2 * 8 + lane / 4];
      sum[e] += exp2_approx(score - largest[e]);
      if (score != -INFINITY && p != 0) {
        mass[e] += p;
        cross[e] += p * (__log2f(p) - score);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], distance);
      cross[e] += __shfl_xor_sync(0xffffffffu, cross[e], distance);
      mass[e] += __shfl_xor_sync(0xffffffffu, mass[e], distance);
    }
    if (lane < 4 && pair[e] >= 0) {
      terms[pair[e]] = make_float4(largest[e], sum[e], cross[e], mass[e]);
    }
  }
}

// The warp's probabilities, for the gradient.
__device__ __forceinline__ void save_probabilities(__half* target, const float* probabilities,
                                                   const int (&pair)[2], int block_size) {
  const int row_floats = IndexerLossConfig::row_floats(block_size);
  const int row_chunks = block_size / 8;
  for (int i = threadIdx.x % 32; i < IndexerLossConfig::kWarpPairs * row_chunks; i += 32) {
    const int row = i / row_chunks, chunk = i % row_chunks;
    const int even = __shfl_sync(0xffffffffu, pair[0], row / 2);
    const int odd = __shfl_sync(0xffffffffu, pair[1], row / 2);
    const int64_t place = row % 2 == 0 ? even : odd;
    if (place < 0) continue;
    const float4* values =
        reinterpret_cast<const float4*>(probabilities + row * row_floats + chunk * 8);
    const float4 low = values[0], high = values[1];
    auto scaled = [](float first, float second) {
      return pack<__half>(first * kSavedProbsScale, second * kSavedProbsScale);
    };
    reinterpret_cast<uint4*>(target + place * block_size)[chunk] = make_uint4(
        scaled(low.x, low.y), scaled(low.z, low.w), scaled(high.x, high.y), scaled(high.z, high.w));
  }
}

// The gradients of the warp's scaled index scores, to `target`: the row of its first pair, of which
// `count` exist. `probabilities` are overwritten.
template <typename Element>
__device__ __forceinline__ void store_score_gradients(Element* target, const IndexScores& scores,
                                                      float* probabilities,
                                                      const float (&index_lse_log2)[2],
                                                      const float (&weight)[2], int block_size,
                                                      int count) {
  const int lane = threadIdx.x % 32;
  const int row_floats = IndexerLossConfig::row_floats(block_size);
#pragma unroll
  for (int m = 0; m < IndexerLossConfig::kMaxBlockSize / 16; ++m) {
    if (m == 4 && block_size == 64) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = i % 2;
      float& p = probabilities[(lane % 4 * 2 + e) * row_floats + m * 16 + i / 2 * 8 + lane / 4];
      p = scores[m][i] != -INFINITY
              ? (exp2_approx(scores[m][i] - index_lse_log2[e]) - p) * weight[e]
              : 0;
    }
  }
  __syncwarp();
  const int row_chunks = block_size / 8;
  for (int i = lane; i < count * row_chunks; i += 32) {
    const float4* values = reinterpret_cast<const float4*>(
        probabilities + i / row_chunks * row_floats + i % row_chunks * 8);
    const float4 low = values[0], high = values[1];
    reinterpret_cast<uint4*>(target)[i] =
        make_uint4(pack<Element>(low.x, low.y), pack<Element>(low.z, low.w),
                   pack<Element>(high.x, high.y), pack<Element>(high.z, high.w));
  }
}

// The last step for a warp's pairs, which are `first` to `first + 7` of the tile.
template <typename Element, bool kGradient>
__device__ __forceinline__ void store_student(const IndexerLossSchedule& schedule,
                                              const KvTile& tile, int first,
                                              const StudentPairs& pairs, const IndexScores& scores,
                                              float* probabilities, int block_size) {
  if constexpr (kGradient) {
    const float scale = schedule.factors[0];
    const float index_lse_log2[2] = {pairs.index_lse[0] * kLog2E, pairs.index_lse[1] * kLog2E};
    const float weight[2] = {pairs.grad_kl[0] * scale, pairs.grad_kl[1] * scale};
    const int64_t place = tile.list_begin + first;
    store_score_gradients(static_cast<Element*>(schedule.score_gradients) + place * block_size,
                          scores, probabilities, index_lse_log2, weight, block_size,
                          min(tile.num_queries - first, IndexerLossConfig::kWarpPairs));
  } else {
    store_terms(schedule.terms, scores, probabilities, pairs.pair, block_size);
    if (schedule.saved_probs != nullptr) {
      save_probabilities(schedule.saved_probs, probabilities, pairs.pair, block_size);
    }
  }
}

}  // namespace msa
