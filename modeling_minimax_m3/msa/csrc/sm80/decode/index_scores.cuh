// Best index score of every key block for every new token and index head.
//
// The slabs (128 keys) of all rows stand in one line, which the CTAs cut into equal shares: ragged
// rows and caches far larger than their contents stay balanced, and the host reads no length. A
// single row's are dealt to the CTAs in turn instead, so that all of them read one region. Keys
// are the n operand of the mma and go from global memory to its registers directly: the order of
// the channels in a dot product is free, so a lane takes 16 contiguous bytes of a key and the
// queries are arranged to match. Queries (token, head) are the m operand, from shared memory.
//
// Up to eight query rows leave half of the m operand free, and keys are then loaded in whole lines:
// a column holds every other 64 bytes of a key, its neighbour the rest. Rows 0 to 7 are the
// queries' channels for even columns, rows 8 to 15 those for odd ones, and what a key scores is the
// sum of two elements that the same lane holds. No multiplication more than with half lines.
#pragma once

#include <cstdint>

#include "params.h"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/matrix.cuh"
#include "smxx/common/ordered_bits.cuh"
#include "smxx/common/quads.cuh"
#include "smxx/decode/cache_rows.cuh"
#include "smxx/decode/config.h"

namespace msa::sm80 {

// 16 keys of one warp. Lane (row g, part c) holds channels 32 j + 8 c .. + 7 of keys g and g + 8;
// of whole lines channels 64 j + 8 (lane % 8) .. + 7 of keys lane / 8 + 0, 4, 8 and 12.
template <int kHeadDim, bool kWholeLines>
struct KeyGroup {
  static constexpr int kLoads = kWholeLines ? 4 : 2;  // keys of a lane
  static constexpr int kChunkOfLoad = kWholeLines ? 64 : 32;
  static constexpr int kChunks = kHeadDim / kChunkOfLoad;

  uint4 keys[kLoads][kChunks];
};

template <int kHeadDim, int kRowTiles, bool kWholeLines>
struct ScoreShared {
  static constexpr int kTileRows = kWholeLines ? kRowTile / 2 : kRowTile;
  static constexpr int kRows = kTileRows * kRowTiles;
  static constexpr int kPhase = score_phase(kRowTiles);
  static constexpr int kSteps = kHeadDim / (kWholeLines ? 32 : 16);

  uint4 queries[kRowTiles][kSteps][32];  // a operands, one a k step and lane
  float maxima[2][kPhase][kScoreWarps][kRows];
  int64_t query_offset[kRows];  // of a query row within its batch row; -1 where there is none
  int token[kRows];
  int first_slab[kBatchChunk];  // running sum of slabs over the rows of the batch chunk
  int end_slab[kBatchChunk];
  int warp_totals[kScoreWarps];
  int first_row;
};

// The part [begin, end) of the line of slabs that this CTA scores; shares differ by at most one.
struct Share {
  int begin, end;
};

__device__ __forceinline__ Share share_of_cta(int total) {
  const int quotient = total / static_cast<int>(gridDim.x);
  const int remainder = total - quotient * static_cast<int>(gridDim.x);
  const int cta = blockIdx.x;
  const int begin = cta * quotient + min(cta, remainder);
  return {begin, begin + quotient + (cta < remainder)};
}

// This CTA's share where there are several rows: sums up their slabs and finds the first row.
template <typename Shared>
__device__ __forceinline__ Share share_of_rows(Shared& shared, int slabs) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = slabs;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) shared.warp_totals[warp] = sum;
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int i = 0; i < kScoreWarps; ++i) {
    if (i < warp) sum += shared.warp_totals[i];
    total += shared.warp_totals[i];
  }
  const Share share = share_of_cta(total);
  shared.first_slab[threadIdx.x] = sum - slabs;
  shared.end_slab[threadIdx.x] = sum;
  if (sum - slabs <= share.begin && share.begin < sum) shared.first_row = threadIdx.x;
  __syncthreads();
  return share;
}

// Notes which token and which query each query row of this CTA is, and brings the queries into L2.
template <typename Element, int kHeadDim, typename Shared>
__device__ __forceinline__ void find_query_rows(const DecodeSelectParams& params, Shared& shared,
                                                int row_begin, int num_rows, int batch_begin,
                                                int batch_rows) {
  if (threadIdx.x >= Shared::kRows) return;
  const int query_row = row_begin + threadIdx.x;
  const int token = query_row / params.num_heads;
  const int head = query_row - token * params.num_heads;
  const int64_t offset = token * params.query_token_stride + head * params.query_head_stride;
  shared.token[threadIdx.x] = token;
  shared.query_offset[threadIdx.x] = query_row < num_rows ? offset : -1;
  if (query_row < num_rows) {
    // Which rows this CTA meets is not known yet; together the CTAs take all of them.
    const int batch_row = batch_begin + static_cast<int>(blockIdx.x % batch_rows);
    const Element* query = static_cast<const Element*>(params.index_query) +
                           batch_row * params.query_batch_stride + offset;
#pragma unroll
    for (int channel = 0; channel < kHeadDim; channel += 64) prefetch_line(query + channel);
  }
}

// The slabs of one batch row that a CTA scores.
struct RowSlabs {
  int batch_row;
  int leftpad;  // slot of the row's first key
  int last_key;
  int count;
  int first;
  int distance;

  __device__ __forceinline__ int slab_at(int i) const { return first + i * distance; }
  // The first key of a warp's group. Groups past the row's end reread its last one.
  __device__ __forceinline__ int group_begin(int i, int warp) const {
    return min(slab_at(i) * kSlabKeys + warp * kGroupKeys, last_key & -kGroupKeys);
  }
  __device__ __forceinline__ int find_page(const CacheParams& cache, int i, int warp) const {
    return load_page(cache, batch_row, leftpad + group_begin(min(i, count - 1), warp));
  }
};

// Loads a warp's group of slab `i`; keys past the row's end reread its last one.
template <typename Element, int kHeadDim, bool kWholeLines>
__device__ __forceinline__ void load_keys(const DecodeSelectParams& params, const RowSlabs& slabs,
                                          int i, int page, int key_stride, int warp, int lane,
                                          KeyGroup<kHeadDim, kWholeLines>& group) {
  using Keys = KeyGroup<kHeadDim, kWholeLines>;
  const int load_row = kWholeLines ? lane / 8 : lane / 4;
  const int load_part = kWholeLines ? lane % 8 : lane % 4;
  const int key = slabs.group_begin(i, warp);
  const Element* base =
      static_cast<const Element*>(params.index_key_cache) + page * params.key_row_stride +
      int64_t{slot_in_page(params.cache, slabs.leftpad + key)} * key_stride + 8 * load_part;
#pragma unroll
  for (int load = 0; load < Keys::kLoads; ++load) {
    const int key_of_load = load_row + kGroupKeys / Keys::kLoads * load;
    const Element* source = base + min(key_of_load, slabs.last_key - key) * key_stride;
#pragma unroll
    for (int j = 0; j < Keys::kChunks; ++j) {
      group.keys[load][j] = load_streamed_16(source + Keys::kChunkOfLoad * j);
    }
  }
}

// Copies a batch row's queries to shared memory, arranged as the keys are.
template <typename Element, int kHeadDim, int kRowTiles, bool kWholeLines>
__device__ __forceinline__ void arrange_queries(
    const DecodeSelectParams& params, int batch_row, int warp, int lane, int part,
    ScoreShared<kHeadDim, kRowTiles, kWholeLines>& shared) {
  using Shared = ScoreShared<kHeadDim, kRowTiles, kWholeLines>;
  const Element* query = static_cast<const Element*>(params.index_query) +
                         batch_row * params.query_batch_stride + 8 * part;
  for (int step = warp; step < Shared::kSteps; step += kScoreWarps) {
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      uint2 half[2] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        // Rows 8 to 15: further query rows, or the same ones' channels for odd columns.
        const int other_row = kWholeLines ? 0 : 8 * k, other_channel = kWholeLines ? 32 * k : 0;
        const int64_t offset =
            shared.query_offset[Shared::kTileRows * row_tile + lane / 4 + other_row];
        if (offset >= 0) {
          const int channel = step / 2 * KeyGroup<kHeadDim, kWholeLines>::kChunkOfLoad +
                              4 * (step % 2) + other_channel;
          half[k] = *reinterpret_cast<const uint2*>(query + offset + channel);
        }
      }
      shared.queries[row_tile][step][lane] = {half[0].x, half[1].x, half[0].y, half[1].y};
    }
  }
}

// Products of a tile of query rows and a group of keys, as four chains of mma, which are slow one
// after the other: of the loads, or of the loads and halves of a load's 16 bytes.
template <typename Element, int kHeadDim, bool kWholeLines, int kSteps, int kLoads, int kChains>
__device__ __forceinline__ void multiply_keys(float (&sums)[kLoads][kChains][4],
                                              const uint4 (&queries)[kSteps][32],
                                              const KeyGroup<kHeadDim, kWholeLines>& group,
                                              int lane) {
#pragma unroll
  for (int j = 0; j < KeyGroup<kHeadDim, kWholeLines>::kChunks; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 a = queries[2 * j + half][lane];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const uint4 b = group.keys[load][j];
        multiply_add<Element>(sums[load][half % kChains], {a.x, a.y, a.z, a.w},
                              half == 0 ? b.x : b.z, half == 0 ? b.y : b.w);
      }
    }
  }
}

// Which of a group's keys the lane's score `k` of a query row belongs to.
template <bool kWholeLines>
__device__ __forceinline__ int key_of_score(int k, int lane) {
  const int part = lane % 4;
  return kWholeLines ? part + 4 * k : 2 * part + k % 2 + 8 * (k / 2);
}

// The lane's four scores of query row lane / 4 and, without whole lines, of that row + 8.
template <bool kWholeLines, int kHalves, int kLoads, int kChains>
__device__ __forceinline__ void add_chains(float (&score)[kHalves][4],
                                           const float (&sums)[kLoads][kChains][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (kWholeLines) {
      score[0][k] = sums[k][0][0] + sums[k][0][3];
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int element = 2 * half + k % 2;
        score[half][k] = sums[k / 2][0][element] + sums[k / 2][1][element];
      }
    }
  }
}

// Scores a warp's group of slab `i` and keeps the best of each query row in `maxima`. Calls
// `after_keys` once the keys have been used.
template <typename Element, int kHeadDim, int kRowTiles, bool kWholeLines, typename AfterKeys>
__device__ __forceinline__ void score_group(
    const ScoreShared<kHeadDim, kRowTiles, kWholeLines>& shared,
    const KeyGroup<kHeadDim, kWholeLines>& group, int key, int first_position, int lane,
    float* maxima, AfterKeys after_keys) {
  using Shared = ScoreShared<kHeadDim, kRowTiles, kWholeLines>;
  constexpr int kLoads = KeyGroup<kHeadDim, kWholeLines>::kLoads;
  constexpr int kHalves = kWholeLines ? 1 : 2;
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
    float sums[kLoads][4 / kLoads][4] = {};
    multiply_keys<Element>(sums, shared.queries[row_tile], group, lane);
    if (row_tile == kRowTiles - 1) after_keys();

    float score[kHalves][4];
    add_chains<kWholeLines>(score, sums);
    const int query_row = Shared::kTileRows * row_tile + lane / 4;
    if (key + kGroupKeys - 1 > first_position) {  // some key may come after some query
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int last = first_position + shared.token[query_row + 8 * half] - key;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (key_of_score<kWholeLines>(k, lane) > last) score[half][k] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float best = max_or_nan(max_or_nan(score[half][0], score[half][1]),
                              max_or_nan(score[half][2], score[half][3]));
      best = quad_max_or_nan(best);
      if (lane % 4 == 0) maxima[query_row + 8 * half] = best;
    }
  }
}

// Writes the best scores of the slabs of a phase, [phase_begin, phase_end), from the warps' maxima.
template <int kHeadDim, int kRowTiles, bool kWholeLines>
__device__ __forceinline__ void store_scores(
    const DecodeSelectParams& params, const RowSlabs& slabs,
    const ScoreShared<kHeadDim, kRowTiles, kWholeLines>& shared, int parity, int phase_end,
    int row_begin, int num_rows, int64_t score_stride) {
  using Shared = ScoreShared<kHeadDim, kRowTiles, kWholeLines>;
  const int phase_begin = (phase_end - 1) / Shared::kPhase * Shared::kPhase;
#pragma unroll 1
  for (int index = threadIdx.x; index < Shared::kPhase * Shared::kRows; index += kScoreThreads) {
    const int query_row = row_begin + index / Shared::kPhase;
    const int slab = phase_begin + index % Shared::kPhase;
    if (slab >= phase_end || query_row >= num_rows) continue;
    float best[2] = {-INFINITY, -INFINITY};  // of the slab's halves
#pragma unroll
    for (int w = 0; w < kScoreWarps; ++w) {
      const float other = shared.maxima[parity][index % Shared::kPhase][w][index / Shared::kPhase];
      best[w / (kScoreWarps / 2)] = max_or_nan(best[w / (kScoreWarps / 2)], other);
    }
    float* scores =
        params.workspace + (int64_t{slabs.batch_row} * num_rows + query_row) * score_stride;
    if (params.block_size == kSlabKeys) {
      scores[slabs.slab_at(slab)] = max_or_nan(best[0], best[1]);
    } else {
      scores[2 * slabs.slab_at(slab)] = best[0];
      scores[2 * slabs.slab_at(slab) + 1] = best[1];
    }
  }
}

template <typename Element, int kHeadDim, int kRowTiles, bool kWholeLines>
__global__ void __launch_bounds__(kScoreThreads, kScoreCtasPerSm)
    index_scores_kernel(const DecodeSelectParams params, int64_t score_stride) {
  using Shared = ScoreShared<kHeadDim, kRowTiles, kWholeLines>;
  using Keys = KeyGroup<kHeadDim, kWholeLines>;
  __shared__ Shared shared;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % 4;
  const int num_rows = params.num_new * params.num_heads;
  const int row_begin = blockIdx.y * Shared::kRows;
  const int batch_begin = blockIdx.z * kBatchChunk;
  const int batch_rows = min(params.batch - batch_begin, kBatchChunk);
  find_query_rows<Element, kHeadDim>(params, shared, row_begin, num_rows, batch_begin, batch_rows);
  const int key_stride = static_cast<int>(params.key_slot_stride);  // fits, as the launch checks
  if (threadIdx.x < batch_rows) {
    prefetch_line(params.cache.cache_seqlens + batch_begin + threadIdx.x);
  }
  __syncthreads();
  wait_for_previous_kernel(params.cache.cache_seqlens);

  // Of this thread's row, or of the only one.
  const bool single_row = batch_rows == 1;
  CacheRow row{0, 0};
  if (threadIdx.x < batch_rows || single_row) {
    row = load_cache_row(params.cache, batch_begin + (single_row ? 0 : threadIdx.x));
  }
  const int num_slabs = (row.length + kSlabKeys - 1) / kSlabKeys;
  const int num_ctas = gridDim.x, cta = blockIdx.x;
  const Share share = single_row ? Share{0, (num_slabs + num_ctas - 1 - cta) / num_ctas}
                                 : share_of_rows(shared, num_slabs);
  if (share.begin >= share.end) return;

  int parity = 0;
  int chunk_row = single_row ? 0 : shared.first_row;
  for (int begin = share.begin; begin < share.end; ++chunk_row) {
    const int first = single_row ? cta : begin - shared.first_slab[chunk_row];
    const int distance = single_row ? num_ctas : 1;
    const int end = single_row ? share.end : min(share.end, shared.end_slab[chunk_row]);
    const int count = end - begin;
    if (count <= 0) continue;
    begin = end;
    const int batch_row = batch_begin + chunk_row;
    if (!single_row) row = load_cache_row(params.cache, batch_row);
    const int first_position = row.length - params.num_new;
    const RowSlabs slabs = {batch_row, row.leftpad, row.length - 1, count, first, distance};

    // Two groups in turn: one in flight while the other is multiplied. Pages are looked up one
    // step earlier still.
    Keys groups[2];
    load_keys<Element>(params, slabs, 0, slabs.find_page(params.cache, 0, warp), key_stride, warp,
                       lane, groups[0]);
    int next_page = slabs.find_page(params.cache, 1, warp);
    const auto refill = [&](Keys& group, int i) {
      if (i < count) {
        load_keys<Element>(params, slabs, i, next_page, key_stride, warp, lane, group);
        next_page = slabs.find_page(params.cache, i + 1, warp);
      }
    };
    refill(groups[1], 1);
    arrange_queries<Element>(params, batch_row, warp, lane, part, shared);
    __syncthreads();

    // Refills the group once its keys have been used.
    const auto score = [&](Keys& group, int i) {
      score_group<Element>(shared, group, slabs.slab_at(i) * kSlabKeys + warp * kGroupKeys,
                           first_position, lane, shared.maxima[parity][i % Shared::kPhase][warp],
                           [&] { refill(group, i + 2); });
    };
#pragma unroll 1
    for (int i = 0; i < count; i += 2) {
      score(groups[0], i);
      if (i + 1 < count) score(groups[1], i + 1);
      const int phase_end = min(i + 2, count);
      if (phase_end % Shared::kPhase != 0 && phase_end < count) continue;
      // The warps meet once per phase; the other half of `maxima` is written meanwhile.
      __syncthreads();
      store_scores(params, slabs, shared, parity, phase_end, row_begin, num_rows, score_stride);
      parity ^= 1;
    }
  }
}

}  // namespace msa::sm80
