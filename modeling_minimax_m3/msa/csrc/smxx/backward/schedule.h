// One part of a backward: its queries, and where its parts lie in the workspace.
#pragma once

#include <cstdint>

#include "params.h"
#include "smxx/forward_kv_major/schedule.h"

namespace msa {

// Pairs and buckets are those of forward_kv_major/schedule.h; the lists of a bucket ascend. A
// "tile" is a stretch of lists.tile_queries pairs of one bucket's list, or what is left of it.
struct BackwardSchedule {
  // partial_out is unused. scale_log2 * (query . key) - lse * log2(e) is the log2 of a probability.
  KvSchedule lists;
  int q_heads_shift;     // log2 of the query heads of a key/value head
  int max_tiles;         // thread blocks to launch; those without a tile return at once
  int32_t* next_tile;    // (1), 0 at launch: thread blocks take tiles in their order
  int32_t* bucket_turn;  // (num_buckets), 0 at launch: tiles of the bucket that have added theirs

  const float* delta;  // (total_q, num_heads), sum over channels of out * grad_out
  // (pairs, q_heads_per_kv, head_dim), 16-bit, times softmax_scale; pairs without bucket are not
  // written. Channels lie in accumulator order: channel 32 i + 8 n + 2 q + e at 32 i + 8 q + 2 n +
  // e.
  void* partial_grad_query;
  // (total_k, num_kv_heads, head_dim), zeros at the first part; every tile adds its sums.
  float* grad_key;  // times softmax_scale
  float* grad_value;
};

}  // namespace msa
