// One part of a KV-major forward: its queries, and where its parts lie in the workspace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../params.h"
#include "config.h"

namespace msa::sm80 {

// A "pair" is one slot of block_indices: (query token, key/value head, slot), counted from the
// first token of the part. A "bucket" is one block of one sequence for one key/value head.
struct KvSchedule {
  int token_begin;  // query tokens [token_begin, token_end)
  int token_end;
  int buckets_per_head;  // at least the blocks of all sequences
  int num_buckets;
  float scale_log2;  // softmax_scale * log2(e)

  void* partial_out;      // (pairs, 16, head_dim) in fragment order, see partial_attention.cuh
  float* partial_lse;     // (pairs, 16), in units of log2
  int32_t* bucket_count;  // (num_buckets), pairs of each bucket
  int32_t* bucket_next;   // (num_buckets), place of the bucket's next pair while they are sorted in
  int32_t* bucket_begin;  // (num_buckets + 1), first pair of each bucket in pair_list
  int32_t* tile_begin;    // (num_buckets + 1), first tile of each bucket
  int32_t* pair_list;     // (pairs), pairs of bucket 0, of bucket 1, ...

  // Tiles of queries that belong to a query-major kernel, see forward_order/tile_order.h, and
  // whether the part has any other; nullptr: every query of every part is KV-major.
  const uint8_t* is_query_major = nullptr;
  const int32_t* has_kv = nullptr;
};

// Most tiles that a part can have: room for full ones and for a last one of every bucket.
inline unsigned max_tiles(const ForwardParams& params, const KvSchedule& schedule) {
  const int64_t pairs = static_cast<int64_t>(schedule.token_end - schedule.token_begin) *
                        params.num_kv_heads * params.topk;
  return static_cast<unsigned>(pairs / kTileQueries + schedule.num_buckets);
}

// Buckets of one key/value head, for any lengths of the sequences.
inline int buckets_per_head(const ForwardParams& params) {
  return params.total_k / params.block_size + params.batch;
}

// Thread blocks of a launch over the tiles when each takes tiles from grid to grid. So few, that
// they cost little where the part turns out to have no tile.
inline unsigned tile_grid(const ForwardParams& params, const KvSchedule& schedule) {
  constexpr unsigned kMost = 4096;
  return std::min(max_tiles(params, schedule), kMost);
}

}  // namespace msa::sm80
