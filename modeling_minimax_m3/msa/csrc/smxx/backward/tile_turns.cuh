// The order of tiles: those of one bucket add to the same gradients, in turn
// (smxx/common/turns.cuh).
//
// A tile may wait for those before it: thread blocks take tiles in ascending order when they start,
// so what is waited for is always running.
#pragma once

#include <cuda_runtime.h>

#include "schedule.h"
#include "smxx/common/turns.cuh"
#include "smxx/forward_kv_major/buckets.cuh"

namespace msa {

// The next tile, for one thread to take; none is left where it is not less than
// lists.tile_begin[num_buckets].
__device__ __forceinline__ int take_tile(const BackwardSchedule& schedule) {
  return atomicAdd(schedule.next_tile, 1);
}

// How many tiles of its bucket come before this one.
__device__ __forceinline__ int turn_of(const BackwardSchedule& schedule, const KvTile& tile) {
  return (tile.list_begin - schedule.lists.bucket_begin[tile.bucket]) / schedule.lists.tile_queries;
}

}  // namespace msa
