// Which blocks are always selected, and which are ranked by their scores.
#pragma once

#include <cuda_runtime.h>

#include "params.h"
#include "schedule.h"
#include "smxx/common/sequences.cuh"

namespace msa {

// Of the blocks [0, visible) that a query sees, the first `init_blocks` and the last
// `local_blocks`, its own among them, are always selected; the blocks between compete for the other
// places.
struct ForcedBlocks {
  int first_ranked;
  int end_ranked;
  int count;

  // The forced blocks in ascending order.
  __device__ __forceinline__ int block(int i) const {
    return i < first_ranked ? i : end_ranked + i - first_ranked;
  }
  __device__ __forceinline__ bool is_ranked(int block) const {
    return block >= first_ranked && block < end_ranked;
  }
};

// Where the two ends may meet.
__device__ __forceinline__ ForcedBlocks forced_blocks(int visible, int init_blocks,
                                                      int local_blocks) {
  const int first = min(init_blocks, visible);
  const int end = max(visible - local_blocks, first);
  return {first, end, first + visible - end};
}

// Where more than init_blocks + local_blocks are visible, so that the two ends are apart, which
// spares registers.
__device__ __forceinline__ ForcedBlocks disjoint_forced_blocks(int visible, int init_blocks,
                                                               int local_blocks) {
  return {init_blocks, visible - local_blocks, init_blocks + local_blocks};
}

// Blocks [first_block, end_block) of a thread block's unit are to be scored for the queries of a
// sequence before token_end; false if there are none.
__device__ __forceinline__ bool find_ranked_blocks(const SelectParams& params,
                                                   const ScoreSchedule& schedule,
                                                   const Sequence& sequence, int unit_begin,
                                                   int token_end, int& first_block,
                                                   int& end_block) {
  const int position_offset = sequence.first_position - sequence.query_begin;
  const int last_own_block = (position_offset + token_end - 1) / params.block_size;
  const ForcedBlocks forced =
      disjoint_forced_blocks(last_own_block + 1, params.init_blocks, params.local_blocks);
  first_block = max(unit_begin, forced.first_ranked);
  end_block = min(unit_begin + schedule.blocks_per_unit, forced.end_ranked);
  return last_own_block >= params.topk && first_block < end_block;
}

}  // namespace msa
