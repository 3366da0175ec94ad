// Attention of gathered queries over one key block, KV-major, with wgmma.
//
// As the mma kernel, with 64 rows a warpgroup: scores of all 128
// keys in one product, an exact softmax over them, a second product with the values. Nothing is
// carried from one block to the next, so scores and outputs never live at the same time and four
// warpgroups fit a multiprocessor; their products fill the gaps of each other's softmax.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "config.h"
#include "params.h"
#include "sm90/ptx/named_barrier.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/row_scores.cuh"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/matrix.cuh"
#include "smxx/common/quads.cuh"
#include "smxx/common/sequences.cuh"
#include "smxx/forward_kv_major/buckets.cuh"
#include "smxx/forward_kv_major/copy_block.cuh"

namespace msa::sm90 {

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    partial_attention_kernel(const ForwardParams params, const KvSchedule schedule) {
  constexpr int kRowChunks = Config::kHeadDim / 8;  // 16-byte chunks of a row

  extern __shared__ __align__(1024) unsigned char shared[];
  for (unsigned number = blockIdx.x;; number += gridDim.x) {
    const KvTile tile = find_tile(params, schedule, number);
    if (tile.num_queries == 0) return;

    const int warpgroup = threadIdx.x / 128;
    const int warp = threadIdx.x / 32 % 4;
    const int lane = threadIdx.x % 32;
    auto& storage = *reinterpret_cast<KvMajorStorage*>(shared);
    const uint32_t keys_address = shared_address(storage.keys);
    const uint32_t values_address = shared_address(storage.values);
    const uint32_t queries_address = shared_address(storage.queries[warpgroup]);

    copy_block<Element, Config>(params, tile, int{Config::kBlockSize}, keys_address, values_address,
                                [](int row, int chunk) {
                                  return chunk / 8 * Config::kKeyPanelBytes +
                                         swizzled_offset<8>(row, chunk % 8);
                                });

    // A warp copies the 16 heads of its own token.
    const int pairs_per_token = params.num_kv_heads * params.topk;
    auto pair_at = [&](int query) {
      return query < tile.num_queries ? schedule.pair_list[tile.list_begin + query] : -1;
    };
    auto copy_query = [&](int pair) {
      const int chunk = lane % kRowChunks;
      const int row_begin = lane / kRowChunks;
      const int token = schedule.token_begin + max(pair, 0) / pairs_per_token;
      const Element* queries =
          static_cast<const Element*>(params.query) + token * params.query_token_stride +
          static_cast<int64_t>(tile.kv_head) * kQHeadsPerKv * params.query_head_stride + chunk * 8;
      const uint32_t panel = queries_address + chunk / 8 * Config::kQueryPanelBytes;
#pragma unroll
      for (int row = row_begin; row < kQHeadsPerKv; row += 32 / kRowChunks) {
        copy_async_16(panel + swizzled_offset<8>(warp * kQHeadsPerKv + row, chunk % 8),
                      queries + row * params.query_head_stride, pair >= 0);
      }
      commit_copies();
    };

    constexpr int kStep = Config::kTokens * Config::kWarpgroups;
    int first_query = warpgroup * Config::kTokens;
    int pair = pair_at(first_query + warp);
    copy_query(pair);
    wait_copies<0>();
    fence_async_proxy();
    __syncthreads();  // keys, values and the first queries have landed

    while (first_query < tile.num_queries) {
      float scores[64];
      wgmma_fence();
      start_scores<Element, Config>(scores, queries_address, keys_address);
      first_query += kStep;
      const int next_pair = pair_at(first_query + warp);
      wgmma_wait<0>();
      accumulators_ready(scores);
      sync_warpgroup(warpgroup);  // every warp is done with the queries
      if (first_query < tile.num_queries) copy_query(next_pair);

      // All rows of a warp belong to one token and see the same keys.
      const int last_key = tile.sequence.first_position - tile.sequence.query_begin +
                           schedule.token_begin + max(pair, 0) / pairs_per_token - tile.first_key;
      float scale = schedule.scale_log2;
      if (scale <= 0) {  // the largest product would not have the largest score
#pragma unroll
        for (int i = 0; i < 64; ++i) scores[i] *= scale;
        scale = 1;
      }
      mask_scores<Config>(scores, last_key);
      float largest[2], sum[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[half] = largest_of_row(scores, half, -INFINITY) * scale;
      }
      sum[0] = sum[1] = 0;
      uint32_t weights[8][4];
#pragma unroll
      for (int i = 0; i < 64; i += 2) {
        const int half = i / 2 % 2;
        const float first = exp2_approx(fmaf(scores[i], scale, -largest[half]));
        const float second = exp2_approx(fmaf(scores[i + 1], scale, -largest[half]));
        sum[half] += first + second;
        weights[i / 8][i % 8 / 2] = pack<Element>(first, second);
      }

      float out[64];
      wgmma_fence();
      start_outputs<Element, Config, false>(out, weights, values_address);
      float inverse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] = quad_sum(sum[half]);
        inverse[half] = 1 / sum[half];
        if (lane % 4 == 0 && pair >= 0) {
          schedule.partial_lse[static_cast<int64_t>(pair) * kQHeadsPerKv + half * 8 + lane / 4] =
              largest[half] + log2f(sum[half]);
        }
      }
      wgmma_wait<0>();
      accumulators_ready(out);
      if (pair >= 0) {
        uint4* target = static_cast<uint4*>(schedule.partial_out) +
                        static_cast<int64_t>(pair) * (kQHeadsPerKv * kRowChunks) + lane;
#pragma unroll
        for (int vector = 0; vector < 8; ++vector) {
          const float* values = out + vector * 8;
          __stcs(target + vector * 32,
                 make_uint4(pack<Element>(values[0] * inverse[0], values[1] * inverse[0]),
                            pack<Element>(values[2] * inverse[1], values[3] * inverse[1]),
                            pack<Element>(values[4] * inverse[0], values[5] * inverse[0]),
                            pack<Element>(values[6] * inverse[1], values[7] * inverse[1])));
        }
      }
      pair = next_pair;
      wait_copies<0>();
      fence_async_proxy();
      sync_warpgroup(warpgroup);  // the next queries have landed
    }
    __syncthreads();  // every warp is done with keys and values
  }
}

}  // namespace msa::sm90
