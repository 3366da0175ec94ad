// The best blocks of every query row, from the block scores.
//
// One CTA per (row, token, head). Forced blocks are the ends of the visible range, so the search
// runs over the ids between them. Every block has a key of its own, (score, lower id first). An
// interval of keys that holds the last wanted one is cut into as many bins as the CTA has threads
// and shrinks to one of them, until so few keys are left that each can count the better ones. It
// ends for any scores: equal ones are told apart by their ids. One or two rounds are usual.
#pragma once

#include <cstdint>

#include "../../common/ordered_bits.cuh"
#include "../../params.h"
#include "cache_rows.cuh"
#include "config.h"
#include "dependent_launch.cuh"

namespace msa::sm80::decode {

constexpr int kListLength = 128;
static_assert(kListLength >= kMaxTopk, "the list holds at least the wanted blocks");

// What is known of the last wanted key.
struct Interval {
  uint64_t high;  // it is at most this one
  uint64_t low;   // and at least this one
  int wanted;     // how many keys of the interval are still wanted
  int matching;   // how many there are
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    top_blocks_kernel(const DecodeSelectParams params, int64_t score_stride) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kBinBits = kThreads == 1024 ? 10 : 8;
  static_assert(kThreads == 1 << kBinBits, "a bin a thread");
  // Scores that a thread keeps: all of them up to 2048 (256 threads) or 8192 (1024) blocks.
  constexpr int kKept = 8;
  __shared__ int histogram[kThreads];
  __shared__ int warp_totals[kWarps];
  __shared__ uint32_t warp_high[kWarps], warp_low[kWarps];
  __shared__ uint64_t list[kListLength];
  __shared__ int list_length;
  __shared__ Interval found;

  // The grid spares the divisions that one linear index would take.
  const int token_row = blockIdx.x;
  const int64_t query_row = int64_t{token_row} * params.num_heads + blockIdx.y;
  const int batch_row = params.num_new == 1 ? token_row : token_row / params.num_new;
  const int token = token_row - batch_row * params.num_new;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int shift_of_block = block_shift(params.block_size);
  int32_t* out = params.block_indices + query_row * params.topk;
  const float* scores = params.workspace + query_row * score_stride;
  if (threadIdx.x == 0) list_length = 0;
  histogram[threadIdx.x] = 0;
  wait_for_previous_kernel(scores, params.cache.cache_seqlens + batch_row, out);

  // Requested before it is known which of them count: the row's length is still on its way.
  float kept_scores[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int block = threadIdx.x + i * kThreads;
    kept_scores[i] = block < score_stride ? scores[block] : 0.0f;
  }
  const int length = load_cache_row(params.cache, batch_row).length;
  const int position = length - params.num_new + token;
  const int visible = position < 0 ? 0 : (position >> shift_of_block) + 1;
  if (visible <= params.topk) {
    for (int i = threadIdx.x; i < params.topk; i += kThreads) out[i] = i < visible ? i : -1;
    return;
  }
  // Blocks [0, low) and [high, visible) are forced; more than `wanted` lie between.
  const int low = min(params.init_blocks, visible);
  const int high = max(visible - params.local_blocks, low);
  const int forced = low + visible - high;
  const int wanted = params.topk - forced;
  for (int i = threadIdx.x; i < forced; i += kThreads) out[i] = i < low ? i : high + i - low;
  if (wanted <= 0) return;

  // Calls visit(key) for every candidate of this thread.
  const auto for_each_key = [&](auto visit) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int block = threadIdx.x + i * kThreads;
      if (i * kThreads < high && block >= low && block < high)
        visit(rank_key(kept_scores[i], block));
    }
#pragma unroll 1
    for (int block = threadIdx.x + kKept * kThreads; block < high; block += kThreads) {
      if (block >= low) visit(rank_key(scores[block], block));
    }
  };

  // The first interval runs from the worst score to the best.
  uint32_t best = 0, worst = ~0u;
  for_each_key([&](uint64_t key) {
    best = max(best, static_cast<uint32_t>(key >> 32));
    worst = min(worst, static_cast<uint32_t>(key >> 32));
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
  Interval interval{uint64_t{best} << 32 | ~0u, uint64_t{worst} << 32, wanted, high - low};

#pragma unroll 1
  while (wanted - interval.wanted + interval.matching > kListLength) {
    const uint64_t width = interval.high - interval.low;
    const int shift = max(64 - __clzll(static_cast<long long>(width)) - kBinBits, 0);
    for_each_key([&](uint64_t key) {
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

  for_each_key([&](uint64_t key) {
    if (key >= interval.low) list[atomicAdd(&list_length, 1)] = key;
  });
  __syncthreads();

  // A key's place in the output is the number of larger ones, so that the order in which the list
  // was filled does not matter. Several neighbouring lanes count for one key.
  constexpr int kLanesPerKey = kThreads / kListLength;
  const int index = threadIdx.x / kLanesPerKey;
  const int length_of_list = list_length;
  const uint64_t key = index < length_of_list ? list[index] : 0;
  int rank = 0;
#pragma unroll 4
  for (int i = threadIdx.x % kLanesPerKey; i < length_of_list; i += kLanesPerKey) {
    rank += list[i] > key;
  }
#pragma unroll
  for (int distance = 1; distance < kLanesPerKey; distance *= 2) {
    rank += __shfl_xor_sync(0xffffffffu, rank, distance);
  }
  if (index < length_of_list && rank < wanted && threadIdx.x % kLanesPerKey == 0) {
    out[forced + rank] = rank_key_id(key);
  }
}

}  // namespace msa::sm80::decode
