// Which bucket a pair belongs to; what both are, schedule.h says.
#pragma once

#include <cuda_runtime.h>

#include "params.h"
#include "schedule.h"
#include "smxx/common/sequences.cuh"
#include "smxx/forward_query_major/tile_union.cuh"

namespace msa {

// First bucket of a sequence within a head. Sequences do not overlap: ceil(len_k / block_size) is
// at most floor(len_k / block_size) + 1.
__device__ __forceinline__ int first_bucket(int key_begin, int sequence, int block_size) {
  return key_begin / block_size + sequence;
}

// Whether nothing of this part is to be done.
__device__ __forceinline__ bool is_idle(const KvSchedule& schedule) {
  return schedule.has_kv != nullptr && *schedule.has_kv == 0;
}

// Whether a query-major kernel takes this query token.
__device__ __forceinline__ bool is_query_major(const ForwardParams& params,
                                               const KvSchedule& schedule, int token, int head) {
  return schedule.is_query_major != nullptr &&
         schedule.is_query_major[static_cast<int64_t>(token / kTileTokens) * params.num_kv_heads +
                                 head] != 0;
}

// A pair's bucket, or -1 if the place names no block that its query sees. Without block_indices,
// place j names block j.
__device__ __forceinline__ int bucket_of_pair(const ForwardParams& params,
                                              const KvSchedule& schedule, int64_t pair) {
  const int slot = static_cast<int>(pair % params.topk);
  const int head = static_cast<int>(pair / params.topk % params.num_kv_heads);
  const int token =
      schedule.token_begin + static_cast<int>(pair / params.topk / params.num_kv_heads);
  if (is_query_major(params, schedule, token, head)) return -1;
  const int block = params.block_indices == nullptr
                        ? slot
                        : params.block_indices[token * params.index_token_stride +
                                               head * params.index_head_stride + slot];
  if (block < 0) return -1;
  const int index = find_sequence(params.cu_seqlens_q, params.batch, token);
  if (index >= params.batch) return -1;
  const Sequence sequence = load_sequence(params.cu_seqlens_q, params.cu_seqlens_k, index,
                                          params.total_q, params.total_k);
  const int position = sequence.first_position + token - sequence.query_begin;
  if (position < 0 || block > position / params.block_size) return -1;
  return head * schedule.buckets_per_head +
         first_bucket(sequence.key_begin, index, params.block_size) + block;
}

// What a thread block of the partial attention works on.
struct KvTile {
  int num_queries;  // 0: the tile does not exist
  int list_begin;   // its first pair in pair_list
  int bucket;
  int kv_head;
  int first_key;  // of the block, among the sequence's keys
  Sequence sequence;
};

// Index of the last of `count` ascending entries that is not greater than `value`.
__device__ __forceinline__ int find_bucket(const int32_t* begins, int count, int value) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (__ldg(begins + middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ KvTile find_tile(const ForwardParams& params, const KvSchedule& schedule,
                                            int tile) {
  const int tile_queries = schedule.tile_queries;
  KvTile result = {};
  if (is_idle(schedule) || tile >= schedule.tile_begin[schedule.num_buckets]) return result;
  // Empty buckets share their first tile with the next one; the last of them is the right one.
  const int bucket = schedule.tile_bucket != nullptr
                         ? schedule.tile_bucket[tile]
                         : find_bucket(schedule.tile_begin, schedule.num_buckets, tile);
  result.list_begin =
      schedule.bucket_begin[bucket] + (tile - schedule.tile_begin[bucket]) * tile_queries;
  result.num_queries = min(schedule.bucket_begin[bucket + 1] - result.list_begin, tile_queries);
  result.bucket = bucket;
  result.kv_head = bucket / schedule.buckets_per_head;

  const int head_bucket = bucket % schedule.buckets_per_head;
  int index = 0, high = params.batch;  // the last sequence that starts at or before the bucket
  while (high - index > 1) {
    const int middle = (index + high) / 2;
    if (first_bucket(params.cu_seqlens_k[middle], middle, params.block_size) <= head_bucket) {
      index = middle;
    } else {
      high = middle;
    }
  }
  result.sequence = load_sequence(params.cu_seqlens_q, params.cu_seqlens_k, index, params.total_q,
                                  params.total_k);
  const int block = head_bucket - first_bucket(result.sequence.key_begin, index, params.block_size);
  result.first_key = max(block, 0) * params.block_size;  // negative only if cu_seqlens_k descends
  return result;
}

}  // namespace msa
