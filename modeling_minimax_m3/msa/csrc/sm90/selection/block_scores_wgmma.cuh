// Best score of every key block for every (query token, index head) row, with wgmma.
//
// The plan of the mma kernel on Hopper's matrix instructions. A warpgroup owns two
// halves of 64 rows; while one half's scores against a key tile are computed, those of the other
// are reduced to their maxima, so that the matrix units always have work in flight.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "config.h"
#include "params.h"
#include "sm90/ptx/wgmma.cuh"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/matrix.cuh"
#include "smxx/common/ordered_bits.cuh"
#include "smxx/common/quads.cuh"
#include "smxx/common/sequences.cuh"
#include "smxx/selection/forced_blocks.cuh"
#include "smxx/selection/score_tile.cuh"

namespace msa::sm90 {

// What a thread block does with the sequence at hand.
struct ScoreSegment {
  const void* key;  // of the first key to score
  int num_keys;     // from there to the end of the sequence
  int row_begin;    // rows of the tile that belong to the sequence
  int row_end;
};

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    block_scores_kernel(const SelectParams params, const ScoreSchedule schedule) {
  constexpr int kHalves = Config::kHalves;
  constexpr int kRowChunks = Config::kRowChunks;
  constexpr int kRowBytes = Config::kHeadDim * 2;
  constexpr int kSteps = Config::kHeadDim / 16;
  constexpr int kStages = Config::kStages;
  constexpr int kCopyRows = Config::kThreads / kRowChunks;  // rows that all threads copy at once
  static_assert(kCopyRows % 8 == 0, "the rows of a thread must share one swizzle");

  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ ScoreSegment segment;  // in registers it would not fit beside queries and scores
  const uint32_t stages_address = shared_address(shared);
  // The queries pass through the stages that keys need last.
  const uint32_t query_address =
      stages_address + kStages * Config::kTileBytes - Config::kQueryBytes;
  int* row_position = reinterpret_cast<ScoreStorage<Config>*>(shared)->row_position;

  const int lane = threadIdx.x % 32;
  const int warpgroup_row = threadIdx.x / 128 * 64 * kHalves;
  const int warp_row = threadIdx.x / 32 % 4 * 16;
  const int lane_row = warpgroup_row + warp_row + lane / 4;
  const ScoreTile query_tile(schedule);

  const int copy_row = threadIdx.x / kRowChunks;
  const int copy_chunk = threadIdx.x % kRowChunks;
  const uint32_t key_copy_address = stages_address + copy_chunk / 8 * Config::kPanelBytes +
                                    swizzled_offset<8>(copy_row, copy_chunk % 8);

  uint32_t query[kHalves][kSteps][4];
  bool query_loaded = false;

  const auto score_sequence = [&](const Sequence& sequence, int token_begin, int token_end) {
    const int position_offset = sequence.first_position - sequence.query_begin;
    int first_block, end_block;
    if (!find_ranked_blocks(params, schedule, sequence, query_tile.unit_begin, token_end,
                            first_block, end_block)) {
      return;
    }

    const int first_key = first_block * params.block_size;
    const int num_tiles =
        ((end_block - first_block) * params.block_size + Config::kTileKeys - 1) / Config::kTileKeys;
    if (threadIdx.x == 0) {
      segment.key =
          static_cast<const Element*>(params.index_key) +
          (static_cast<int64_t>(sequence.key_begin) + first_key) * params.key_token_stride;
      segment.num_keys = sequence.len_k - first_key;
      segment.row_begin = (token_begin - query_tile.begin) * params.num_heads;
      segment.row_end = (token_end - query_tile.begin) * params.num_heads;
    }
    __syncthreads();
    // Tiles come in pairs; the second may be one too many.
    auto copy_pair = [&](int tile) {
      if (tile < num_tiles) {
        const uint32_t target = key_copy_address + tile % kStages * Config::kTileBytes;
        const Element* keys = static_cast<const Element*>(segment.key) + copy_chunk * 8;
        const int num_keys = segment.num_keys;
        const int key = tile * Config::kTileKeys + copy_row;
#pragma unroll
        for (int row = 0; row < 2 * Config::kTileKeys; row += kCopyRows) {
          const bool valid = key + row < num_keys;
          copy_async_16(
              target + row / Config::kTileKeys * Config::kTileBytes + row % Config::kTileKeys * 128,
              keys + (valid ? key + row : 0) * params.key_token_stride, valid);
        }
      }
      commit_copies();
    };

    if (!query_loaded) {
      copy_queries<Element, Config>(params, query_tile, [&](int row) {
        return query_address + swizzled_offset<kRowChunks>(row, copy_chunk);
      });
    }
    copy_pair(0);
    copy_pair(2);
    // Only without a forced own block can a ranked block reach past its query.
    const bool masks = params.local_blocks == 0;
    if (masks) {
      store_positions<Config>(row_position, params, query_tile, position_offset);
    }
    wait_copies<1>();
    fence_async_proxy();
    __syncthreads();  // the queries, the first two tiles and row_position are there
    if (!query_loaded) {
      query_loaded = true;
      const uint32_t address = query_address + (warpgroup_row + warp_row) * kRowBytes +
                               swizzled_offset<kRowChunks>(lane & 15, lane >> 4);
      load_fragments(query, address, 64 * kRowBytes);
    }

    float scores[kHalves][64];
    float kept[kHalves][2];  // of block 4n + lane % 4, until four blocks are written together
    auto start_scores = [&](float (&d)[64], const uint32_t (&a)[kSteps][4], int tile) {
      const uint32_t stage = stages_address + tile % kStages * Config::kTileBytes;
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t panel = stage + step / 4 * Config::kPanelBytes + step % 4 * 32;
        wgmma_m64n128k16<Element>(d, a[step], swizzled_descriptor(panel), step > 0);
      }
      wgmma_commit();
    };

    // One block's maxima of a half: reduced over the row's four lanes, kept until four can be
    // written.
    auto finish_block = [&](int half, int block, float first, float second) {
      if (block >= end_block) return;
      float best[2] = {first, second};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        best[i] = quad_max_or_nan(best[i]);
        if (block % 4 == lane % 4) kept[half][i] = best[i];
      }
      if (block % 4 != 3 && block != end_block - 1) return;
      const int own = block / 4 * 4 + lane % 4;
      if (own < first_block || own > block) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane_row + half * 64 + i * 8;
        if (row < segment.row_begin || row >= segment.row_end) continue;
        const int64_t workspace_row =
            static_cast<int64_t>(query_tile.begin - schedule.token_begin) * params.num_heads + row;
        params.workspace[workspace_row * schedule.row_stride + own] = kept[half][i];
      }
    };

    auto reduce_scores = [&](float (&d)[64], int half, int tile) {
      if (masks) {
        const int key = first_key + tile * Config::kTileKeys + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          const int position = row_position[lane_row + half * 64 + i / 2 % 2 * 8];
          if (key + i / 4 * 8 + i % 2 > position) d[i] = -INFINITY;
        }
      }
      float best[2][2];  // [64 keys each][rows lane / 4 and lane / 4 + 8]
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float value = max_or_nan(d[part * 32 + 2 * i], d[part * 32 + 2 * i + 1]);
#pragma unroll
          for (int j = 1; j < 8; ++j) {
            value = max_or_nan(
                value, max_or_nan(d[part * 32 + 4 * j + 2 * i], d[part * 32 + 4 * j + 2 * i + 1]));
          }
          best[part][i] = value;
        }
      }
      if (params.block_size == Config::kTileKeys) {
        finish_block(half, first_block + tile, max_or_nan(best[0][0], best[1][0]),
                     max_or_nan(best[0][1], best[1][1]));
      } else {
        const int block = first_block + 2 * tile;
        finish_block(half, block, best[0][0], best[0][1]);
        finish_block(half, block + 1, best[1][0], best[1][1]);
      }
    };

    // One product is in flight while another's result is reduced; none at the loop's end,
    // because the compiler would then wait for each product where it is issued.
    for (int tile = 0; tile < num_tiles; tile += 2) {
      start_scores(scores[0], query[0], tile);
      start_scores(scores[1], query[1], tile);
      wait_copies<0>();
      fence_async_proxy();
      __syncthreads();  // the next pair has landed, and every warp is done with the pair before
      copy_pair(tile + 4);
      wgmma_wait<1>();
      accumulators_ready(scores[0]);
      reduce_scores(scores[0], 0, tile);
      start_scores(scores[0], query[0], tile + 1);
      wgmma_wait<1>();
      accumulators_ready(scores[1]);
      reduce_scores(scores[1], 1, tile);
      start_scores(scores[1], query[1], tile + 1);
      wgmma_wait<1>();
      accumulators_ready(scores[0]);
      reduce_scores(scores[0], 0, tile + 1);
      wgmma_wait<0>();
      accumulators_ready(scores[1]);
      reduce_scores(scores[1], 1, tile + 1);
    }
    __syncthreads();  // every warp is done with the stages and row_position
  };
  for_each_sequence(params, query_tile.begin, query_tile.end, score_sequence);
}

}  // namespace msa::sm90
