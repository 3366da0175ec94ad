// The eight pairs that a warp works on. Lane l holds the query token of pair l % 8.
#pragma once

#include <cuda_runtime.h>

#include "config.h"
#include "schedule.h"
#include "smxx/forward_kv_major/buckets.cuh"

namespace msa {

// Pair `index` of the tile; -1 where there is none.
__device__ __forceinline__ int load_pair(const IndexerLossSchedule& schedule, const KvTile& tile,
                                         int index) {
  return index < tile.num_queries ? schedule.lists.pair_list[tile.list_begin + index] : -1;
}

// The query token of a pair; -1 for none.
__device__ __forceinline__ int token_of(const IndexerLossParams& params,
                                        const IndexerLossSchedule& schedule, int pair) {
  const int pairs_per_token = params.attention.num_kv_heads * params.attention.topk;
  return pair < 0 ? -1 : schedule.lists.token_begin + pair / pairs_per_token;
}

// The last key that a query sees, counted from the block's first; -1 for no query.
__device__ __forceinline__ int last_visible_key(const KvTile& tile, int token) {
  const int position = tile.sequence.first_position + token - tile.sequence.query_begin;
  return token < 0 ? -1 : position - tile.first_key;
}

}  // namespace msa
