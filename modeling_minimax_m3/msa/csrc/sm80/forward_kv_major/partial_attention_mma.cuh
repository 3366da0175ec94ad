// Attention of gathered queries over one key block, KV-major.
//
// A thread block loads the keys and values of one block once and takes up to 128 of the tokens that
// chose it through them. A token with its 16 heads is one m16 tile, so no arithmetic is wasted
// whatever the selection. Warps share nothing but keys and values and run freely; the next two
// tokens' queries are fetched while the present ones are worked on.
#pragma once

#include <cuda_runtime.h>

#include "config.h"
#include "params.h"
#include "sm80/forward_query_major/online_softmax.cuh"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/matrix.cuh"
#include "smxx/common/quads.cuh"
#include "smxx/common/sequences.cuh"
#include "smxx/forward_kv_major/buckets.cuh"
#include "smxx/forward_kv_major/copy_block.cuh"
#include "smxx/forward_kv_major/schedule.h"

namespace msa::sm80 {

// The last visible key of each token of a warp, counted from the block's first.
struct PairVisibleKeys {
  int limits[2];
  __device__ __forceinline__ int limit(int row) const { return row < 16 ? limits[0] : limits[1]; }
};

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    partial_attention_kernel(const ForwardParams params, const KvSchedule schedule) {
  constexpr int kRowTiles = Config::kRowTiles;
  constexpr int kRowChunks = Config::kRowChunks;
  constexpr int kRowBytes = Config::kRowBytes;
  constexpr int kSteps = Config::kHeadDim / 16;
  constexpr int kLaneCopyRows = 32 / kRowChunks;  // rows that a warp copies at once

  extern __shared__ __align__(1024) unsigned char shared[];
  for (unsigned number = blockIdx.x;; number += gridDim.x) {
    const KvTile tile = find_tile(params, schedule, number);
    if (tile.num_queries == 0) return;
    const Sequence& sequence = tile.sequence;

    const uint32_t keys_address = shared_address(shared);
    const uint32_t values_address = keys_address + params.block_size * kRowBytes;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const uint32_t queries_address =
        values_address + params.block_size * kRowBytes + warp * Config::kQueryBytes;

    copy_block<Element, Config>(
        params, tile, params.block_size, keys_address, values_address,
        [](int row, int chunk) { return swizzled_offset<kRowChunks>(row, chunk); });

    const int pairs_per_token = params.num_kv_heads * params.topk;
    auto pair_at = [&](int query) {
      return query < tile.num_queries ? schedule.pair_list[tile.list_begin + query] : -1;
    };
    // Two tokens of a warp, with 16 heads each, to its part of shared memory.
    auto copy_queries = [&](int first, int second) {
      const int copy_row = lane / kRowChunks;
      const int copy_chunk = lane % kRowChunks;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int pair = i == 0 ? first : second;
        const int token = schedule.token_begin + max(pair, 0) / pairs_per_token;
        const Element* queries = static_cast<const Element*>(params.query) +
                                 token * params.query_token_stride +
                                 (static_cast<int64_t>(tile.kv_head) * kQHeadsPerKv + copy_row) *
                                     params.query_head_stride +
                                 copy_chunk * 8;
#pragma unroll
        for (int row = 0; row < 16; row += kLaneCopyRows) {
          copy_async_16(
              queries_address + swizzled_offset<kRowChunks>(i * 16 + row + copy_row, copy_chunk),
              queries + row * params.query_head_stride, pair >= 0);
        }
      }
      commit_copies();
    };

    constexpr int kStep = kRowTiles * Config::kWarps;
    int query_index = warp * kRowTiles;
    int first = pair_at(query_index), second = pair_at(query_index + 1);
    copy_queries(first, second);
    wait_copies<0>();
    __syncthreads();  // keys and values have landed

    const uint32_t query_address =
        queries_address + swizzled_offset<kRowChunks>(lane & 15, lane >> 4);
    const uint32_t key_address =
        keys_address + swizzled_offset<kRowChunks>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
    const uint32_t value_address =
        values_address + swizzled_offset<kRowChunks>(lane & 15, lane >> 4);
    while (first >= 0) {
      wait_copies<0>();
      __syncwarp();
      uint32_t query[kRowTiles][kSteps][4];
      load_fragments(query, query_address, 16 * kRowBytes);
      __syncwarp();
      query_index += kStep;
      const int next_first = pair_at(query_index), next_second = pair_at(query_index + 1);
      if (next_first >= 0) copy_queries(next_first, next_second);

      const int offset =
          sequence.first_position - sequence.query_begin + schedule.token_begin - tile.first_key;
      const PairVisibleKeys visible = {
          {offset + first / pairs_per_token, offset + max(second, 0) / pairs_per_token}};
      const bool masks =
          visible.limits[0] < params.block_size - 1 || visible.limits[1] < params.block_size - 1;
      RunningSoftmax<Config> running;
      running.clear();
      auto attend = [&](auto end) {
#pragma unroll 1
        for (int keys = 0; keys < params.block_size; keys += 16) {
          attend_16_keys<Element, Config, 0, decltype(end)::value>(
              running, query, key_address + keys * kRowBytes, value_address + keys * kRowBytes,
              schedule.scale_log2, masks, keys, visible);
        }
      };
      if (second >= 0) {
        attend(std::integral_constant<int, 2>{});
      } else {
        attend(std::integral_constant<int, 1>{});
      }

#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int pair = i == 0 ? first : second;
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = running.sum[i][half];
          sum = quad_sum(sum);
          inverse[half] = 1 / sum;
          if (lane % 4 == 0 && pair >= 0) {
            schedule.partial_lse[static_cast<int64_t>(pair) * kQHeadsPerKv + half * 8 + lane / 4] =
                running.reference[i][half] + log2f(sum);
          }
        }
        if (pair < 0) continue;
        uint4* target = static_cast<uint4*>(schedule.partial_out) +
                        static_cast<int64_t>(pair) * (kQHeadsPerKv * kRowChunks) + lane;
#pragma unroll
        for (int vector = 0; vector < kSteps; ++vector) {
          const float (&low)[4] = running.out[i][2 * vector];
          const float (&high)[4] = running.out[i][2 * vector + 1];
          target[vector * 32] =
              make_uint4(pack<Element>(low[0] * inverse[0], low[1] * inverse[0]),
                         pack<Element>(low[2] * inverse[1], low[3] * inverse[1]),
                         pack<Element>(high[0] * inverse[0], high[1] * inverse[0]),
                         pack<Element>(high[2] * inverse[1], high[3] * inverse[1]));
        }
      }
      first = next_first;
      second = next_second;
    }
    __syncthreads();  // every warp is done with keys and values
  }
}

}  // namespace msa::sm80
