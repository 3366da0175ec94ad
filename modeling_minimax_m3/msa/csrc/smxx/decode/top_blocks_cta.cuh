// The best blocks of every query row, from the block scores.
//
// One CTA per (row, token, head). Forced blocks are the ends of the visible range, so the search
// runs over the ids between them. Every block has a key of its own, (score, lower id first). Both
// ways of searching only find a few keys that are certain to hold the wanted ones; each of these
// then counts the better ones.
//
// Usual: the blocks are dealt to 32 groups, and the best scores of the groups are ranked. Where n
// are wanted, the n-th best of them is a score that n blocks reach, so that no wanted block lies
// below it. 16 of thousands of blocks leave about 22.
//
// Where that leaves too many (equal scores, say) or more than 32 are wanted: an interval of keys
// that holds the last wanted one is cut into as many bins as the CTA has threads and shrinks to one
// of them, until few are left. It ends for any scores: equal ones are told apart by their ids.
#pragma once

#include <cstdint>

#include "cache_rows.cuh"
#include "config.h"
#include "params.h"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/ordered_bits.cuh"
#include "smxx/selection/forced_blocks.cuh"

namespace msa {

constexpr int kListLength = 128;
static_assert(kListLength >= kMaxTopk, "the list holds at least the wanted blocks");
// A lane is a group: neighbouring blocks, which tend to score alike, are in different ones.
constexpr int kGroups = 32;

// rank_key of a score that ordered_bits has seen already.
__device__ __forceinline__ uint64_t key_of_bits(uint32_t bits, int id) {
  return static_cast<uint64_t>(bits) << 32 | ~static_cast<uint32_t>(id);
}

// What is known of the last wanted key.
struct Interval {
  uint64_t high;  // it is at most this one
  uint64_t low;   // and at least this one
  int wanted;     // how many keys of the interval are still wanted
  int matching;   // how many there are
};

// kKept: the scores that a thread keeps in registers; those of longer rows are read again.
template <int kThreads, int kKept>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    top_blocks_kernel(const DecodeSelectParams params, int64_t score_stride) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kBinBits = kThreads == 1024 ? 10 : 8;
  static_assert(kThreads == 1 << kBinBits, "a bin a thread");
  static_assert(kThreads >= kMaxTopk, "a place of the output a thread");
  // A warp's share of 32 things that each take a vote.
  constexpr int kShare = 32 / kWarps;
  __shared__ uint32_t group_best[kGroups];
  __shared__ uint32_t threshold;
  __shared__ int histogram[kThreads];
  __shared__ int warp_totals[kWarps];
  __shared__ uint32_t warp_high[kWarps], warp_low[kWarps];
  __shared__ uint64_t list[kListLength];
  __shared__ int quick_length, search_length;  // of the list, as either way of searching fills it
  __shared__ Interval found;

  // The grid spares the divisions that one linear index would take.
  const int token_row = blockIdx.x;
  const int64_t query_row = int64_t{token_row} * params.num_heads + blockIdx.y;
  const int batch_row = params.num_new == 1 ? token_row : token_row / params.num_new;
  const int token = token_row - batch_row * params.num_new;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int shift_of_block = block_shift(params.block_size);
  int32_t* out = params.block_indices + query_row * params.topk;
  // From this thread's first block on.
  const float* scores = params.workspace + query_row * score_stride + threadIdx.x;
  const int row_blocks = static_cast<int>(score_stride);  // fits: fewer than the slots
  if (threadIdx.x < kGroups) group_best[threadIdx.x] = 0;
  if (threadIdx.x == 0) quick_length = search_length = 0;
  histogram[threadIdx.x] = 0;
  __syncthreads();
  wait_for_previous_kernel(scores, params.cache.cache_seqlens + batch_row, out);

  // Requested before it is known which of them count: the row's length is still on its way.
  float kept_scores[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int block = threadIdx.x + i * kThreads;
    kept_scores[i] = block < row_blocks ? scores[i * kThreads] : 0.0f;
  }
  const int length = load_cache_row(params.cache, batch_row).length;
  const int position = length - params.num_new + token;
  const int visible = position < 0 ? 0 : (position >> shift_of_block) + 1;
  const int place = threadIdx.x;
  if (visible <= params.topk) [[unlikely]] {
    if (place < params.topk) out[place] = place < visible ? place : -1;
    return;
  }
  const ForcedBlocks forced = forced_blocks(visible, params.init_blocks, params.local_blocks);
  const int wanted = params.topk - forced.count;  // more than that are ranked
  if (place < forced.count) out[place] = forced.block(place);
  if (wanted <= 0) return;

  // Scores as ordered bits, which are never 0; 0 where the block is no candidate.
  uint32_t kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int block = threadIdx.x + i * kThreads;
    kept[i] = forced.is_ranked(block) ? ordered_bits(kept_scores[i]) : 0;
  }
  // Calls visit(bits, block) for every candidate of this thread that is not below `least`, which is
  // at least 1.
  const auto for_each_from = [&](uint32_t least, auto visit) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (kept[i] >= least) visit(kept[i], threadIdx.x + i * kThreads);
    }
#pragma unroll 1
    for (int block = threadIdx.x + kKept * kThreads; block < forced.end_ranked; block += kThreads) {
      const uint32_t bits =
          block >= forced.first_ranked ? ordered_bits(scores[block - threadIdx.x]) : 0;
      if (bits >= least) visit(bits, block);
    }
  };

  int length_of_list = kListLength + 1;
  if (wanted <= kGroups) {
    uint32_t best = 0;
    for_each_from(1, [&](uint32_t bits, int) { best = max(best, bits); });
    atomicMax(&group_best[lane], best);
    __syncthreads();

    // Equal groups are ranked by their lanes, so that one and only one has the wanted rank. Few
    // candidates leave groups empty: if that is one of them, all candidates pass.
    const uint32_t of_lane = group_best[lane];
    uint32_t of_group[kShare];
#pragma unroll
    for (int k = 0; k < kShare; ++k) of_group[k] = group_best[warp + k * kWarps];
    uint32_t candidate = 0, before = 0;  // of group `lane` of the warp's share
#pragma unroll
    for (int k = 0; k < kShare; ++k) {
      const bool equal_before = of_lane == of_group[k] && lane < warp + k * kWarps;
      const uint32_t votes = __ballot_sync(0xffffffffu, of_lane > of_group[k] || equal_before);
      if (lane == k) {
        candidate = of_group[k];
        before = votes;
      }
    }
    if (lane < kShare && __popc(before) == wanted - 1) threshold = max(candidate, 1u);
    __syncthreads();

    const uint32_t least = threshold;
    int hits = 0;
    for_each_from(least, [&](uint32_t, int) { ++hits; });
    if (hits > 0) {
      int index = atomicAdd(&quick_length, hits);
      for_each_from(least, [&](uint32_t bits, int block) {
        if (index < kListLength) list[index] = key_of_bits(bits, block);
        ++index;
      });
    }
    __syncthreads();
    length_of_list = quick_length;
  }

  if (length_of_list > kListLength) [[unlikely]] {
    // The first interval runs from the worst score to the best.
    uint32_t best = 0, worst = ~0u;
    for_each_from(1, [&](uint32_t bits, int) {
      best = max(best, bits);
      worst = min(worst, bits);
    });
    best = __reduce_max_sync(0xffffffffu, best);
    worst = __reduce_min_sync(0xffffffffu, worst);
    if (lane == 0) {
      warp_high[warp] = best;
      warp_low[warp] = worst;
    }
    __syncthreads();
    best = __reduce_max_sync(0xffffffffu, warp_high[lane % kWarps]);
    worst = __reduce_min_sync(0xffffffffu, warp_low[lane % kWarps]);
    Interval interval{uint64_t{best} << 32 | ~0u, uint64_t{worst} << 32, wanted,
                      forced.end_ranked - forced.first_ranked};

#pragma unroll 1
    while (wanted - interval.wanted + interval.matching > kListLength) {
      const uint64_t width = interval.high - interval.low;
      const int shift = max(64 - __clzll(static_cast<long long>(width)) - kBinBits, 0);
      for_each_from(1, [&](uint32_t bits, int block) {
        const uint64_t key = key_of_bits(bits, block);
        if (key <= interval.high && key >= interval.low) {
          atomicAdd(&histogram[(interval.high - key) >> shift], 1);
        }
      });
      __syncthreads();

      // Running counts from the best bin on; each thread leaves its bin empty for the next round.
      const int matching = histogram[threadIdx.x];
      histogram[threadIdx.x] = 0;
      int running = matching;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, running, distance);
        if (lane >= distance) running += other;
      }
      if (lane == 31) warp_totals[warp] = running;
      __syncthreads();
      const int of_earlier_warp = lane < warp ? warp_totals[lane] : 0;
      running += __reduce_add_sync(0xffffffffu, of_earlier_warp);
      if (running - matching < interval.wanted && interval.wanted <= running) {
        const uint64_t bin_high = interval.high - (static_cast<uint64_t>(threadIdx.x) << shift);
        const uint64_t bin_width = (uint64_t{1} << shift) - 1;
        found = {bin_high, bin_high - min(bin_width, bin_high - interval.low),
                 interval.wanted - (running - matching), matching};
      }
      __syncthreads();
      interval = found;
    }

    for_each_from(1, [&](uint32_t bits, int block) {
      const uint64_t key = key_of_bits(bits, block);
      if (key >= interval.low) list[atomicAdd(&search_length, 1)] = key;
    });
    __syncthreads();
    length_of_list = search_length;
  }

  // A key's place in the output is the number of larger ones, so that the order in which the list
  // was filled does not matter. Each warp ranks its share of 32 keys at a time, mostly once.
#pragma unroll 1
  for (int begin = 0; begin < length_of_list; begin += 32) {
    uint64_t key[kShare], own = 0;  // own: key `lane` of the share
#pragma unroll
    for (int k = 0; k < kShare; ++k) {
      key[k] = list[begin + warp + k * kWarps];
      if (lane == k) own = key[k];
    }
    int rank = 0;
#pragma unroll 1
    for (int first = 0; first < length_of_list; first += 32) {
      const uint64_t other = first + lane < length_of_list ? list[first + lane] : 0;
      uint32_t larger = 0;
#pragma unroll
      for (int k = 0; k < kShare; ++k) {
        const uint32_t votes = __ballot_sync(0xffffffffu, other > key[k]);
        if (lane == k) larger = votes;
      }
      rank += __popc(larger);
    }
    const bool listed = lane < kShare && begin + warp + lane * kWarps < length_of_list;
    if (listed && rank < wanted) out[forced.count + rank] = rank_key_id(own);
  }
}

}  // namespace msa
