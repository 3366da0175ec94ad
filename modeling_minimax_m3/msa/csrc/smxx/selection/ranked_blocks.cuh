// Which key blocks are ranked.
#pragma once

#include <cuda_runtime.h>

#include "params.h"
#include "schedule.h"
#include "smxx/common/sequences.cuh"

namespace msa {

// Blocks [first_block, end_block) of a thread block's unit are to be scored for the queries of a
// sequence before token_end; false if there are none. Forced blocks are never ranked, and queries
// that see at most topk blocks take them all.
__device__ __forceinline__ bool find_ranked_blocks(const SelectParams& params,
                                                   const ScoreSchedule& schedule,
                                                   const Sequence& sequence, int unit_begin,
                                                   int token_end, int& first_block,
                                                   int& end_block) {
  const int position_offset = sequence.first_position - sequence.query_begin;
  const int last_own_block = (position_offset + token_end - 1) / params.block_size;
  first_block = max(unit_begin, params.init_blocks);
  end_block = min(unit_begin + schedule.blocks_per_unit, last_own_block - params.local_blocks + 1);
  return last_own_block >= params.topk && first_block < end_block;
}

}  // namespace msa
