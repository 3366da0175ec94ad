// One part of a KV-major forward: its queries, and where its parts lie in the workspace.
#pragma once

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
};

// Thread blocks of a launch over the tiles: room for full tiles and for a last one of every bucket.
// Those that turn out not to exist return at once.
inline unsigned max_tiles(const ForwardParams& params, const KvSchedule& schedule) {
  const int64_t pairs = static_cast<int64_t>(schedule.token_end - schedule.token_begin) *
                        params.num_kv_heads * params.topk;
  return static_cast<unsigned>(pairs / kTileQueries + schedule.num_buckets);
}

}  // namespace msa::sm80
