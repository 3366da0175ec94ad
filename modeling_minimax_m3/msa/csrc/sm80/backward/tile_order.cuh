// Tiles of one bucket add to the same gradients, one after the other in their order, so that sums
// repeat bit for bit.
//
// A tile may wait for those before it: thread blocks take tiles in ascending order when they start,
// so what is waited for is always running.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../forward_kv/buckets.cuh"
#include "schedule.h"

namespace msa::sm80 {

// The next tile, for one thread to take; none is left where it is not less than
// lists.tile_begin[num_buckets].
__device__ __forceinline__ int take_tile(const BackwardSchedule& schedule) {
  return atomicAdd(schedule.next_tile, 1);
}

// How many tiles of its bucket come before this one.
__device__ __forceinline__ int turn_of(const BackwardSchedule& schedule, const KvTile& tile) {
  return (tile.list_begin - schedule.lists.bucket_begin[tile.bucket]) / schedule.tile_queries;
}

// Waits, in one thread, until the earlier tiles of the bucket have added their sums. What this
// thread's block then reads of them must not come from L1. The first tile does not wait.
__device__ __forceinline__ void await_turn(const BackwardSchedule& schedule, int bucket, int turn) {
  const int32_t* address = schedule.bucket_turn + bucket;
  int32_t passed;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(passed) : "l"(address) : "memory");
  } while (passed != turn);
}

// Lets the next tile of the bucket add, from one thread: after every thread of the block has
// written, fenced (__threadfence) and met at a barrier.
__device__ __forceinline__ void pass_turn(const BackwardSchedule& schedule, int bucket, int turn) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;\n" ::"l"(schedule.bucket_turn + bucket),
               "r"(turn + 1)
               : "memory");
}

}  // namespace msa::sm80
