// One part of the indexer's loss: its queries, and where its parts lie in the workspace.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "config.h"
#include "params.h"
#include "smxx/forward_kv_major/schedule.h"

namespace msa {

// Pairs and buckets are those of forward_kv_major/schedule.h. A "tile" is a stretch of at most
// kTilePairs pairs of one bucket's list.
struct IndexerLossSchedule {
  // partial_out and partial_lse are unused. In the gradient the lists of a bucket ascend; -1 stands
  // at their end where a query named a block twice.
  KvSchedule lists;
  int max_tiles;           // thread blocks to launch; those without a tile return at once
  float index_scale_log2;  // index_scale * log2(e)

  // (pairs, block_size): this part of IndexerLossParams::saved_probs; nullptr for none.
  __half* saved_probs;

  // Value: sums over the keys of a pair's block, in units of log2, with u the scaled index scores:
  // largest u, sum of 2^(u - largest), sum of p * (log2(p) - u), sum of p.
  float4* terms;  // (pairs)

  // Gradient. Score gradients are grad_kl * (r - p) * factors[0], a power of two that brings them
  // into the range of 16 bits; factors[1] takes it out again and applies index_scale.
  float* factors;              // (2)
  void* score_gradients;       // (places of pair_list, block_size), 16-bit; of a part without
                               // saved probabilities only
  float* partial_index_query;  // (pairs, index_dim), over factors[1]
  float* index_key_sums;       // (total_k, index_dim), over factors[1]; zeros at the first part
  int32_t* next_tile;          // (1), 0 at launch: thread blocks take tiles in their order
  int32_t* block_turn;  // (buckets_per_head), 0 at launch: tiles of the block, of all heads, added
};

}  // namespace msa
