// The pairs of every bucket in the order of their tokens, so that sums over them repeat.
//
// A token names a block once, so a list is a set of tokens: a bit each, and a pair's place is the
// number of bits before its own. Where a query did name a block twice, one of the two remains.
#pragma once

#include <cuda_runtime.h>

#include "schedule.h"

namespace msa {

constexpr int kSortThreads = 256;

// Shared memory: a word of bits, and the number of bits before it, for every 32 tokens of the part.
inline int sort_bytes(int tokens) {
  return (tokens + 31) / 32 * 8;
}

// One thread block a bucket; `unsorted` to lists.pair_list.
__global__ void __launch_bounds__(kSortThreads)
    sort_lists_kernel(const KvSchedule lists, const int32_t* unsorted, int pairs_per_token) {
  extern __shared__ uint32_t words[];
  __shared__ int warp_sums[kSortThreads / 32];
  const int begin = lists.bucket_begin[blockIdx.x];
  const int count = lists.bucket_begin[blockIdx.x + 1] - begin;
  if (count == 0) return;
  const int num_words = (lists.token_end - lists.token_begin + 31) / 32;
  auto* before = reinterpret_cast<int*>(words + num_words);

  for (int i = threadIdx.x; i < num_words; i += kSortThreads) words[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kSortThreads) {
    const int token = unsorted[begin + i] / pairs_per_token;
    atomicOr(words + token / 32, 1u << token % 32);
  }
  __syncthreads();

  const int chunk = (num_words + kSortThreads - 1) / kSortThreads;
  const int first = min(static_cast<int>(threadIdx.x) * chunk, num_words);
  const int last = min(first + chunk, num_words);
  int own = 0;
  for (int i = first; i < last; ++i) own += __popc(words[i]);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int sum = own;  // inclusive, within the warp
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int distinct = 0;
#pragma unroll
  for (int i = 0; i < kSortThreads / 32; ++i) {
    if (i < warp) sum += warp_sums[i];
    distinct += warp_sums[i];
  }
  sum -= own;
  for (int i = first; i < last; ++i) {
    before[i] = sum;
    sum += __popc(words[i]);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < count; i += kSortThreads) {
    const int pair = unsorted[begin + i];
    const int token = pair / pairs_per_token;
    const uint32_t lower = words[token / 32] & ((1u << token % 32) - 1);
    lists.pair_list[begin + before[token / 32] + __popc(lower)] = pair;
  }
  for (int i = distinct + threadIdx.x; i < count; i += kSortThreads)
    lists.pair_list[begin + i] = -1;
}

}  // namespace msa
