// Best score of every key block for every (query token, index head) row.
//
// The index heads share one key head, so a tile stacks tokens x heads into 256 rows and a key tile
// is loaded once for all of them. Scores never leave registers; only their maximum over a block is
// written. A thread block handles one query tile and a range of key blocks, which makes units of
// equal work however long the sequence is.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "config.h"
#include "params.h"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/matrix.cuh"
#include "smxx/common/ordered_bits.cuh"
#include "smxx/common/quads.cuh"
#include "smxx/common/sequences.cuh"
#include "smxx/selection/forced_blocks.cuh"
#include "smxx/selection/schedule.h"
#include "smxx/selection/score_tile.cuh"

namespace msa::sm80 {

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    block_scores_kernel(const SelectParams params, const ScoreSchedule schedule) {
  constexpr int kRowTiles = Config::kRowTiles;
  constexpr int kRowChunks = Config::kRowChunks;
  constexpr int kRowBytes = Config::kHeadDim * 2;
  constexpr int kSteps = Config::kHeadDim / 16;
  constexpr int kStages = Config::kStages;
  constexpr int kCopyRows = Config::kThreads / kRowChunks;  // rows that all threads copy at once
  static_assert(kCopyRows % 8 == 0, "the rows of a thread must share one swizzle");

  extern __shared__ __align__(1024) unsigned char shared[];
  int* row_position = reinterpret_cast<ScoreStorage<Config>*>(shared)->row_position;
  const uint32_t stages_address = shared_address(shared);

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const ScoreTile query_tile(schedule);

  const int copy_row = threadIdx.x / kRowChunks;
  const int copy_chunk = threadIdx.x % kRowChunks;
  const uint32_t copy_address = stages_address + swizzled_offset<kRowChunks>(copy_row, copy_chunk);

  // Chunks 2 * step and 2 * step + 1 of a lane's matrix rows: step enters by an exclusive or.
  const uint32_t key_offset =
      swizzled_offset<kRowChunks>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  const int lane_row = warp * Config::kWarpRows + lane / 4;

  uint32_t query[kRowTiles][kSteps][4];
  bool query_loaded = false;

  const auto score_sequence = [&](const Sequence& sequence, int token_begin, int token_end) {
    const int position_offset = sequence.first_position - sequence.query_begin;
    int first_block, end_block;
    if (!find_ranked_blocks(params, schedule, sequence, query_tile.unit_begin, token_end,
                            first_block, end_block)) {
      return;
    }

    if (!query_loaded) {
      query_loaded = true;
      copy_queries<Element, Config>(
          params, query_tile, [&](int row) { return copy_address + (row - copy_row) * kRowBytes; });
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      const uint32_t address = stages_address + warp * Config::kWarpRows * kRowBytes +
                               swizzled_offset<kRowChunks>(lane & 15, lane >> 4);
      load_fragments(query, address, 16 * kRowBytes);
    }
    // Only without a forced own block can a ranked block reach past its query.
    const bool masks = params.local_blocks == 0;
    if (masks) {
      store_positions<Config>(row_position, params, query_tile, position_offset);
    }
    __syncthreads();  // the stages are free, row_position is written

    const int tiles_per_block = params.block_size / Config::kTileKeys;
    const int num_tiles = (end_block - first_block) * tiles_per_block;
    const int first_key = first_block * params.block_size;
    const Element* key_base = static_cast<const Element*>(params.index_key) +
                              sequence.key_begin * params.key_token_stride + copy_chunk * 8;
    auto copy_keys = [&](int tile) {
      const uint32_t target = copy_address + tile % kStages * Config::kTileBytes;
      const int key = first_key + tile * Config::kTileKeys + copy_row;
#pragma unroll
      for (int row = 0; row < Config::kTileKeys; row += kCopyRows) {
        const bool valid = key + row < sequence.len_k;
        copy_async_16(target + row * kRowBytes,
                      key_base + (valid ? key + row : 0) * params.key_token_stride, valid);
      }
    };

#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) {
      if (tile < num_tiles) copy_keys(tile);
      commit_copies();
    }

    float best[kRowTiles][2];  // of rows lane / 4 and lane / 4 + 8 of each m16 tile
    float kept[kRowTiles][2];  // of block 4n + lane % 4, until four blocks are written together
    for (int tile = 0; tile < num_tiles; ++tile) {
      wait_copies<kStages - 2>();
      __syncthreads();
      if (tile + kStages - 1 < num_tiles) copy_keys(tile + kStages - 1);
      commit_copies();

      const int tile_of_block = tile % tiles_per_block;
      if (tile_of_block == 0) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) best[i][0] = best[i][1] = -INFINITY;
      }

      const uint32_t stage = stages_address + tile % kStages * Config::kTileBytes + key_offset;
#pragma unroll 1  // unrolled further, the queries no longer fit the registers
      for (int keys = 0; keys < Config::kTileKeys; keys += 16) {
        float scores[kRowTiles][2][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t key[4];
          load_matrix_x4(key, (stage + keys * kRowBytes) ^ (step * 32));
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply_add<Element>(scores[i][0], query[i][step], key[0], key[1]);
            multiply_add<Element>(scores[i][1], query[i][step], key[2], key[3]);
          }
        }
        if (masks) {
          const int key = first_key + tile * Config::kTileKeys + keys + lane % 4 * 2;
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int position = row_position[lane_row + i * 16 + j / 2 * 8];
              if (key + j % 2 > position) scores[i][0][j] = -INFINITY;
              if (key + j % 2 + 8 > position) scores[i][1][j] = -INFINITY;
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float first = max_or_nan(scores[i][0][2 * half], scores[i][0][2 * half + 1]);
            const float second = max_or_nan(scores[i][1][2 * half], scores[i][1][2 * half + 1]);
            best[i][half] = max_or_nan(best[i][half], max_or_nan(first, second));
          }
        }
      }
      if (tile_of_block != tiles_per_block - 1) continue;

      const int block = first_block + tile / tiles_per_block;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float value = best[i][half];
          value = quad_max_or_nan(value);
          if (block % 4 == lane % 4) kept[i][half] = value;
        }
      }
      if (block % 4 != 3 && block != end_block - 1) continue;

      // The four lanes of a row write up to four neighbouring scores.
      const int own = block / 4 * 4 + lane % 4;
      if (own >= first_block && own <= block) {
        const int row_begin = (token_begin - query_tile.begin) * params.num_heads;
        const int row_end = (token_end - query_tile.begin) * params.num_heads;
        float* target =
            params.workspace + own +
            (static_cast<int64_t>(query_tile.begin - schedule.token_begin) * params.num_heads +
             lane_row) *
                schedule.row_stride;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = lane_row + i * 16 + half * 8;
            if (row >= row_begin && row < row_end) {
              target[(i * 16 + half * 8) * schedule.row_stride] = kept[i][half];
            }
          }
        }
      }
    }
    wait_copies<0>();
    __syncthreads();  // every warp is done with the stages
  };
  for_each_sequence(params, query_tile.begin, query_tile.end, score_sequence);
}

}  // namespace msa::sm80
