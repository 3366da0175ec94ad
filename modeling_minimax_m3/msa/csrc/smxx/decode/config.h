// Tiles of the decode kernels, and how their work is split over the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"
#include "smxx/common/supported.h"

namespace msa {

// A warp takes 16 keys at a time (the m or k of one mma); a page holds whole groups of 16.
constexpr int kGroupKeys = 16;

// Index scores: the eight warps of a CTA take the eight groups of a slab of 128 keys.
constexpr int kScoreWarps = 8;
constexpr int kScoreThreads = 32 * kScoreWarps;
constexpr int kScoreCtasPerSm = 2;
constexpr int kSlabKeys = kScoreWarps * kGroupKeys;
// Batch rows whose lengths one CTA adds up to find its share; more rows go to further grids.
constexpr int kBatchChunk = kScoreThreads;
// Query rows (token, head) of a CTA, in tiles of 16: the m of one mma.
constexpr int kRowTile = 16;
constexpr int kMaxRowTiles = 4;

// Slabs (an even number) whose maxima are collected in shared memory before the warps meet.
__host__ __device__ constexpr int score_phase(int row_tiles) {
  return row_tiles <= 2 ? 8 : 4;
}

// Top-k: one CTA per query row, large ones for long caches. The scores that its threads keep are
// all of them up to 512, 2048 and 8192 blocks.
constexpr int kTopThreads = 256;
constexpr int kTopThreadsLong = 1024;
constexpr int kTopKept = 8;
constexpr int kTopKeptShort = 2;  // of a short row every instruction counts

// Attention: four warps, each with its own 16 keys at a time and its own softmax.
constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr int kAttentionCtasPerSm = 3;
constexpr int kMaxSplits = 32;       // one lane each when they are combined
constexpr int kMaxQHeadsPerKv = 16;  // query heads per key/value head: the m of one mma
constexpr int kMaxGroupsPerCta = kMaxTopk * 128 / kGroupKeys;

// Strides between slots stay within 32 bits also times the keys of a group.
constexpr int64_t kMaxSlotStride = (int64_t{1} << 31) / kGroupKeys - 1;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Blocks of a score row: whole slabs, and a multiple of four.
inline int64_t score_row_stride(const DecodeSelectParams& params) {
  const int64_t slabs = ceil_div(params.cache.max_slots, kSlabKeys);
  return ceil_div(slabs * (kSlabKeys / params.block_size), 4) * 4;
}

// Blocks hold 64 or 128 keys; a shift is what the kernels divide by.
__host__ __device__ constexpr int block_shift(int block_size) {
  return block_size == 64 ? 6 : 7;
}

struct AttentionPlan {
  int splits;            // CTAs per (row, token, key/value head)
  int groups_per_split;  // groups of 16 keys that one of them visits
};

// Trades the groups that a warp visits one after the other against the rounds in which the CTAs
// follow each other on the device. A CTA's start, merge and partial output cost about as much as
// three groups.
inline AttentionPlan plan_attention(const DecodeAttentionParams& params) {
  constexpr int64_t kOverhead = 3;
  const int64_t items = int64_t{params.batch} * params.num_new * params.num_kv_heads;
  const int64_t groups = int64_t{params.topk} * params.block_size / kGroupKeys;
  const int64_t slots = int64_t{kAttentionCtasPerSm} * params.num_sms;
  AttentionPlan best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t steps = ceil_div(groups, kAttentionWarps); steps >= 1; --steps) {
    const int64_t splits = ceil_div(groups, steps * kAttentionWarps);
    if (splits > kMaxSplits) break;
    const int64_t cost = ceil_div(items * splits, slots) * (steps + kOverhead);
    if (cost < best_cost) {
      best_cost = cost;
      best = {static_cast<int>(splits), static_cast<int>(steps * kAttentionWarps)};
    }
  }
  return best;
}

}  // namespace msa
