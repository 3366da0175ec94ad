// Which queries chose each block: the block lists turned around.
//
// Count, scan, fill, for several parts at once (y of the grid): for one source file only, being no
// templates. The fill order within a bucket depends on the run, but nothing else does: each pair's
// result is computed from its own rows and stored at its own place.
#pragma once

#include <cuda_runtime.h>

#include "buckets.cuh"
#include "config.h"
#include "params.h"
#include "schedule.h"

namespace msa {

__global__ void count_pairs_kernel(const ForwardParams params, const KvParts parts) {
  const KvSchedule schedule = parts.part(blockIdx.y);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t num_pairs = static_cast<int64_t>(schedule.token_end - schedule.token_begin) *
                            params.num_kv_heads * params.topk;
  if (pair >= num_pairs || is_idle(schedule)) return;
  const int bucket = bucket_of_pair(params, schedule, pair);
  if (bucket >= 0) atomicAdd(schedule.bucket_count + bucket, 1);
}

// Exclusive sums over the buckets, of pairs and of tiles; one thread block a part.
__global__ void __launch_bounds__(1024) scan_buckets_kernel(const KvParts parts) {
  const KvSchedule schedule = parts.part(blockIdx.y);
  const int tile_queries = schedule.tile_queries;
  constexpr int kPerThread = 4;
  __shared__ int warp_pairs[32];
  __shared__ int warp_tiles[32];
  if (is_idle(schedule)) return;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int pairs_before = 0, tiles_before = 0;
  for (int base = 0; base < schedule.num_buckets; base += 1024 * kPerThread) {
    const int first = base + static_cast<int>(threadIdx.x) * kPerThread;
    int count[kPerThread];
    int pairs = 0, tiles = 0;  // of this thread
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      count[i] = first + i < schedule.num_buckets ? schedule.bucket_count[first + i] : 0;
      pairs += count[i];
      tiles += (count[i] + tile_queries - 1) / tile_queries;
    }
    int pair_sum = pairs, tile_sum = tiles;  // inclusive, within the warp
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other_pairs = __shfl_up_sync(0xffffffffu, pair_sum, distance);
      const int other_tiles = __shfl_up_sync(0xffffffffu, tile_sum, distance);
      if (lane >= distance) {
        pair_sum += other_pairs;
        tile_sum += other_tiles;
      }
    }
    if (lane == 31) {
      warp_pairs[warp] = pair_sum;
      warp_tiles[warp] = tile_sum;
    }
    __syncthreads();
    int pairs_total = 0, tiles_total = 0;
    for (int i = 0; i < 32; ++i) {
      if (i < warp) {
        pair_sum += warp_pairs[i];
        tile_sum += warp_tiles[i];
      }
      pairs_total += warp_pairs[i];
      tiles_total += warp_tiles[i];
    }
    int pair_begin = pairs_before + pair_sum - pairs;
    int tile_begin = tiles_before + tile_sum - tiles;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (first + i < schedule.num_buckets) {
        schedule.bucket_begin[first + i] = pair_begin;
        schedule.bucket_next[first + i] = pair_begin;
        schedule.tile_begin[first + i] = tile_begin;
      }
      const int tile_end = tile_begin + (count[i] + tile_queries - 1) / tile_queries;
      if (schedule.tile_bucket != nullptr) {
        for (int tile = tile_begin; tile < tile_end; ++tile) schedule.tile_bucket[tile] = first + i;
      }
      pair_begin += count[i];
      tile_begin = tile_end;
    }
    pairs_before += pairs_total;
    tiles_before += tiles_total;
    __syncthreads();  // the sums are read
  }
  if (threadIdx.x == 0) {
    schedule.bucket_begin[schedule.num_buckets] = pairs_before;
    schedule.tile_begin[schedule.num_buckets] = tiles_before;
  }
}

__global__ void fill_lists_kernel(const ForwardParams params, const KvParts parts) {
  const KvSchedule schedule = parts.part(blockIdx.y);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t num_pairs = static_cast<int64_t>(schedule.token_end - schedule.token_begin) *
                            params.num_kv_heads * params.topk;
  if (pair >= num_pairs || is_idle(schedule)) return;
  const int bucket = bucket_of_pair(params, schedule, pair);
  if (bucket < 0) return;
  schedule.pair_list[atomicAdd(schedule.bucket_next + bucket, 1)] = static_cast<int>(pair);
}

}  // namespace msa
