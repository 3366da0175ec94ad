// The best blocks of every (query token, index head) row of block scores.
//
// One warp reads a row once, front to back. Scores above the k-th best so far are collected in
// shared memory; 32 of them at a time are sorted and merged into the best list, which lies sorted
// over the registers of the warp. On random scores few get that far, and no input costs more than a
// sort of 32 keys per 32 scores. Keys order by score, then by lower id, so that ties and the
// result's order are exact.
#pragma once

#include <cuda_runtime.h>

#include "config.h"
#include "forced_blocks.cuh"
#include "params.h"
#include "schedule.h"
#include "smxx/common/ordered_bits.cuh"
#include "smxx/common/sequences.cuh"

namespace msa {

constexpr unsigned kFullWarp = 0xffffffffu;

// Sorts a bitonic sequence of 32 keys, one a lane, in descending order.
__device__ __forceinline__ uint64_t merge_bitonic(uint64_t key, int lane) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, key, distance);
    const bool keeps_larger = (lane & distance) == 0;
    key = (key > other) == keeps_larger ? key : other;
  }
  return key;
}

// Sorts 32 keys, one a lane, in descending order.
__device__ __forceinline__ uint64_t sort_keys(uint64_t key, int lane) {
#pragma unroll
  for (int length = 2; length <= 32; length *= 2) {
#pragma unroll
    for (int distance = length / 2; distance > 0; distance /= 2) {
      const uint64_t other = __shfl_xor_sync(kFullWarp, key, distance);
      const bool keeps_larger = ((lane & distance) == 0) == ((lane & length) == 0);
      key = (key > other) == keeps_larger ? key : other;
    }
  }
  return key;
}

// The best 32 * kLists keys seen, in descending order: lane l of list i holds rank 32 * i + l.
template <int kLists>
struct BestKeys {
  uint64_t keys[kLists];

  // Merges 32 keys, one a lane and in any order.
  __device__ __forceinline__ void insert(uint64_t key, int lane) {
    uint64_t incoming = sort_keys(key, lane);
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      // Against the reversed list, the larger of each pair are the best 32 of the 64.
      const uint64_t reversed = __shfl_xor_sync(kFullWarp, incoming, 31);
      const bool stays = keys[i] > reversed;
      const uint64_t better = stays ? keys[i] : reversed;
      const uint64_t worse = stays ? reversed : keys[i];
      keys[i] = merge_bitonic(better, lane);
      if (i + 1 < kLists) incoming = merge_bitonic(worse, lane);
    }
  }

  __device__ __forceinline__ uint64_t at_rank(int rank) const {
    uint64_t key = keys[0];
#pragma unroll
    for (int i = 1; i < kLists; ++i) {
      if (rank / 32 == i) key = keys[i];
    }
    return __shfl_sync(kFullWarp, key, rank % 32);
  }
};

template <int kLists>
__global__ void __launch_bounds__(32 * kTopkWarps)
    top_blocks_kernel(const SelectParams params, const ScoreSchedule schedule) {
  // Fewer than 32 keys wait before a step, and a step adds at most 128.
  __shared__ uint64_t waiting_keys[kTopkWarps][160];
  uint64_t* waiting = waiting_keys[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTopkWarps + threadIdx.x / 32;
  const int64_t num_rows =
      static_cast<int64_t>(schedule.token_end - schedule.token_begin) * params.num_heads;
  if (row >= num_rows) return;

  const int token = schedule.token_begin + static_cast<int>(row / params.num_heads);
  int32_t* selected =
      params.block_indices +
      (static_cast<int64_t>(schedule.token_begin) * params.num_heads + row) * params.topk;

  int own_block = -1;  // none: the token belongs to no sequence, or has no key
  const int index = find_sequence(params.cu_seqlens_q, params.batch, token);
  if (index < params.batch) {
    const Sequence sequence = load_sequence(params.cu_seqlens_q, params.cu_seqlens_k, index,
                                            params.total_q, params.total_k);
    const int position = sequence.first_position + token - sequence.query_begin;
    if (position >= 0) own_block = position / params.block_size;
  }
  if (own_block < params.topk) {
    for (int i = lane; i < params.topk; i += 32) selected[i] = i <= own_block ? i : -1;
    return;
  }

  const ForcedBlocks forced =
      disjoint_forced_blocks(own_block + 1, params.init_blocks, params.local_blocks);
  for (int i = lane; i < forced.count; i += 32) selected[i] = forced.block(i);
  const int num_ranked = params.topk - forced.count;
  if (num_ranked == 0) return;

  BestKeys<kLists> best = {};
  int num_waiting = 0;
  uint32_t threshold =
      0;  // score bits of the worst key that still counts; 0 until there are enough
  auto merge_waiting = [&] {  // the last 32, or all if there are fewer
    const int first = max(num_waiting - 32, 0);
    __syncwarp();
    best.insert(first + lane < num_waiting ? waiting[first + lane] : 0, lane);
    __syncwarp();
    num_waiting = first;
    // A later block of the same score has the higher id, so only better scores can still enter.
    threshold = static_cast<uint32_t>(best.at_rank(num_ranked - 1) >> 32);
  };

  const float* scores = params.workspace + row * schedule.row_stride;
  for (int base = forced.first_ranked / 4 * 4; base < forced.end_ranked; base += 128) {
    const int first = base + lane * 4;
    // Rows are padded to a multiple of four floats, so that this stays inside the workspace.
    float4 values = make_float4(0, 0, 0, 0);
    if (first < forced.end_ranked) values = __ldcs(reinterpret_cast<const float4*>(scores + first));
    const float value[4] = {values.x, values.y, values.z, values.w};
    bool enters[4];
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      enters[i] = forced.is_ranked(first + i) && ordered_bits(value[i]) > threshold;
      any |= enters[i];
    }
    if (!__any_sync(kFullWarp, any)) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned entering = __ballot_sync(kFullWarp, enters[i]);
      if (enters[i]) {
        const int slot = num_waiting + __popc(entering & ((1u << lane) - 1));
        waiting[slot] = rank_key(value[i], first + i);
      }
      num_waiting += __popc(entering);
    }
    while (num_waiting >= 32) merge_waiting();
  }
  if (num_waiting > 0) merge_waiting();

#pragma unroll
  for (int i = 0; i < kLists; ++i) {
    const int rank = 32 * i + lane;
    if (rank < num_ranked) selected[forced.count + rank] = rank_key_id(best.keys[i]);
  }
}

}  // namespace msa
