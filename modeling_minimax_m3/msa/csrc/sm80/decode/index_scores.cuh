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

template <typename Element, int kHeadDim, int kRowTiles, bool kWholeLines>
__global__ void __launch_bounds__(kScoreThreads, kScoreCtasPerSm)
    index_scores_kernel(const DecodeSelectParams params, int64_t score_stride) {
  using Shared = ScoreShared<kHeadDim, kRowTiles, kWholeLines>;
  using Keys = KeyGroup<kHeadDim, kWholeLines>;
  __shared__ Shared shared;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group_row = lane / 4, part = lane % 4;
  const int load_row = kWholeLines ? lane / 8 : group_row;
  const int load_part = kWholeLines ? lane % 8 : part;
  const int num_rows = params.num_new * params.num_heads;
  const int row_begin = blockIdx.y * Shared::kRows;
  const int batch_begin = blockIdx.z * kBatchChunk;
  const int batch_rows = min(params.batch - batch_begin, kBatchChunk);
  if (threadIdx.x < Shared::kRows) {
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
  const int slabs = (row.length + kSlabKeys - 1) / kSlabKeys;
  const int num_ctas = gridDim.x, cta = blockIdx.x;
  const Share share =
      single_row ? Share{0, (slabs + num_ctas - 1 - cta) / num_ctas} : share_of_rows(shared, slabs);
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
    const int last_key = row.length - 1;
    const int last_group = last_key & -kGroupKeys;
    const int first_position = row.length - params.num_new;

    const auto slab_at = [&](int i) { return first + i * distance; };
    // Groups past the row's end reread its last one, keys past its end its last key.
    const auto group_begin = [&](int i) {
      return min(slab_at(i) * kSlabKeys + warp * kGroupKeys, last_group);
    };
    const auto find_page = [&](int i) {
      return load_page(params.cache, batch_row, row.leftpad + group_begin(min(i, count - 1)));
    };
    const auto load_keys = [&](Keys& group, int i, int page) {
      const int key = group_begin(i);
      const Element* base =
          static_cast<const Element*>(params.index_key_cache) + page * params.key_row_stride +
          int64_t{slot_in_page(params.cache, row.leftpad + key)} * key_stride + 8 * load_part;
#pragma unroll
      for (int load = 0; load < Keys::kLoads; ++load) {
        const int key_of_load = load_row + kGroupKeys / Keys::kLoads * load;
        const Element* source = base + min(key_of_load, last_key - key) * key_stride;
#pragma unroll
        for (int j = 0; j < Keys::kChunks; ++j) {
          group.keys[load][j] = load_streamed_16(source + Keys::kChunkOfLoad * j);
        }
      }
    };
    // Calls `after_keys` once the keys have been used.
    const auto score_group = [&](const Keys& group, int i, auto after_keys) {
      const int key = slab_at(i) * kSlabKeys + warp * kGroupKeys;
      float* maxima = shared.maxima[parity][i % Shared::kPhase][warp];
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        // Four chains of mma, which are slow one after the other: of the loads, or of the loads and
        // halves of a load's 16 bytes.
        constexpr int kChains = 4 / Keys::kLoads;
        float sums[Keys::kLoads][kChains][4] = {};
#pragma unroll
        for (int j = 0; j < Keys::kChunks; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4 a = shared.queries[row_tile][2 * j + half][lane];
#pragma unroll
            for (int load = 0; load < Keys::kLoads; ++load) {
              const uint4 b = group.keys[load][j];
              multiply_add<Element>(sums[load][half % kChains], {a.x, a.y, a.z, a.w},
                                    half == 0 ? b.x : b.z, half == 0 ? b.y : b.w);
            }
          }
        }
        if (row_tile == kRowTiles - 1) after_keys();

        // Of query rows group_row (and + 8) four keys each: see key_of_score.
        constexpr int kHalves = kWholeLines ? 1 : 2;
        const auto key_of_score = [&](int k) {
          return kWholeLines ? part + 4 * k : 2 * part + k % 2 + 8 * (k / 2);
        };
        float score[kHalves][4];
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
        const int query_row = Shared::kTileRows * row_tile + group_row;
        if (key + kGroupKeys - 1 > first_position) {  // some key may come after some query
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            const int last = first_position + shared.token[query_row + 8 * half] - key;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (key_of_score(k) > last) score[half][k] = -INFINITY;
            }
          }
        }
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          float best = max_or_nan(max_or_nan(score[half][0], score[half][1]),
                                  max_or_nan(score[half][2], score[half][3]));
          best = quad_max_or_nan(best);
          if (part == 0) maxima[query_row + 8 * half] = best;
        }
      }
    };

    // Two groups in turn: one in flight while the other is multiplied. Pages are looked up one
    // step earlier still.
    Keys groups[2];
    load_keys(groups[0], 0, find_page(0));
    int next_page = find_page(1);
    const auto refill = [&](Keys& group, int i) {
      if (i < count) {
        load_keys(group, i, next_page);
        next_page = find_page(i + 1);
      }
    };
    refill(groups[1], 1);

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
              shared.query_offset[Shared::kTileRows * row_tile + group_row + other_row];
          if (offset >= 0) {
            const int channel = step / 2 * Keys::kChunkOfLoad + 4 * (step % 2) + other_channel;
            half[k] = *reinterpret_cast<const uint2*>(query + offset + channel);
          }
        }
        shared.queries[row_tile][step][lane] = {half[0].x, half[1].x, half[0].y, half[1].y};
      }
    }
    __syncthreads();

#pragma unroll 1
    for (int i = 0; i < count; i += 2) {
      score_group(groups[0], i, [&] { refill(groups[0], i + 2); });
      if (i + 1 < count) score_group(groups[1], i + 1, [&] { refill(groups[1], i + 3); });
      const int phase_end = min(i + 2, count);
      if (phase_end % Shared::kPhase != 0 && phase_end < count) continue;

      // The warps meet once per phase; the other half of `maxima` is written meanwhile.
      __syncthreads();
      const int phase_begin = (phase_end - 1) / Shared::kPhase * Shared::kPhase;
#pragma unroll 1
      for (int index = threadIdx.x; index < Shared::kPhase * Shared::kRows;
           index += kScoreThreads) {
        const int query_row = row_begin + index / Shared::kPhase;
        const int slab = phase_begin + index % Shared::kPhase;
        if (slab >= phase_end || query_row >= num_rows) continue;
        float best[2] = {-INFINITY, -INFINITY};  // of the slab's halves
#pragma unroll
        for (int w = 0; w < kScoreWarps; ++w) {
          const float other =
              shared.maxima[parity][index % Shared::kPhase][w][index / Shared::kPhase];
          best[w / (kScoreWarps / 2)] = max_or_nan(best[w / (kScoreWarps / 2)], other);
        }
        float* scores =
            params.workspace + (int64_t{batch_row} * num_rows + query_row) * score_stride;
        if (params.block_size == kSlabKeys) {
          scores[slab_at(slab)] = max_or_nan(best[0], best[1]);
        } else {
          scores[2 * slab_at(slab)] = best[0];
          scores[2 * slab_at(slab) + 1] = best[1];
        }
      }
      parity ^= 1;
    }
  }
}

}  // namespace msa::sm80
