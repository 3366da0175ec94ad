// Puts the pairs of every bucket in ascending order, so that sums over a list repeat bit for bit.
// Unlike indexer_loss/sorted_lists.cuh it keeps a block that a query named twice, and takes parts
// of any size.
//
// For one source file only, being no templates.
#pragma once

#include <cuda_runtime.h>

#include "schedule.h"
#include "smxx/common/bitonic_sort.cuh"
#include "smxx/forward_kv_major/buckets.cuh"
#include "smxx/forward_query_major/block_union.cuh"

namespace msa {

constexpr int kSortThreads = 128;
constexpr int kSortedInShared = 4096;  // pairs of a bucket at most, a power of two

// Which of `flags` before this thread's are set, over the block, and how many in all. Two barriers.
__device__ __forceinline__ int2 count_before(bool flag) {
  __shared__ int warp_counts[kSortThreads / 32];
  const unsigned votes = __ballot_sync(0xffffffffu, flag);
  if (threadIdx.x % 32 == 0) warp_counts[threadIdx.x / 32] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << threadIdx.x % 32) - 1)), total = 0;
  for (int warp = 0; warp < kSortThreads / 32; ++warp) {
    if (warp < threadIdx.x / 32) before += warp_counts[warp];
    total += warp_counts[warp];
  }
  __syncthreads();
  return {before, total};
}

// One thread block a bucket. Also makes the tiles of the bucket ready to be taken.
__global__ void __launch_bounds__(kSortThreads)
    sort_lists_kernel(const ForwardParams params, const BackwardSchedule schedule) {
  __shared__ uint32_t entries[kSortedInShared];
  const KvSchedule& lists = schedule.lists;
  const int bucket = blockIdx.x;
  if (threadIdx.x == 0) {
    schedule.bucket_turn[bucket] = 0;
    if (bucket == 0) *schedule.next_tile = 0;
  }
  const int begin = lists.bucket_begin[bucket];
  const int count = lists.bucket_begin[bucket + 1] - begin;
  int32_t* list = lists.pair_list + begin;
  if (count <= 1) return;

  if (count <= kSortedInShared) {
    int padded = 2;  // a power of two
    while (padded < count) padded *= 2;
    for (int i = threadIdx.x; i < padded; i += kSortThreads) {
      entries[i] = i < count ? static_cast<uint32_t>(list[i]) : kNoEntry;
    }
    sort_entries<kSortThreads>(entries, padded, threadIdx.x, [] { __syncthreads(); });
    for (int i = threadIdx.x; i < count; i += kSortThreads) list[i] = static_cast<int>(entries[i]);
    return;
  }

  // A long list is written anew, by a walk over everything that its sequence's queries chose.
  const KvTile tile = find_tile(params, lists, lists.tile_begin[bucket]);
  const Sequence& sequence = tile.sequence;
  const int token_begin = max(lists.token_begin, sequence.query_begin);
  const int token_end = min(lists.token_end, sequence.query_end);
  const int64_t num_slots = static_cast<int64_t>(max(token_end - token_begin, 0)) * params.topk;
  int written = 0;
  for (int64_t base = 0; base < num_slots && written < count; base += kSortThreads) {
    const int64_t i = base + threadIdx.x;
    const int token = token_begin + static_cast<int>(i / params.topk);
    const int slot = static_cast<int>(i % params.topk);
    const bool chose = i < num_slots &&
                       params.block_indices[token * params.index_token_stride +
                                            tile.kv_head * params.index_head_stride + slot] ==
                           tile.first_key / params.block_size &&
                       sequence.first_position + token - sequence.query_begin >= tile.first_key;
    const int2 place = count_before(chose);
    if (chose && written + place.x < count) {
      list[written + place.x] =
          ((token - lists.token_begin) * params.num_kv_heads + tile.kv_head) * params.topk + slot;
    }
    written += place.y;
  }
}

}  // namespace msa
