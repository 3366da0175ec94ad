// What every score kernel does around its products: its tile of query rows and their way to shared
// memory.
//
// A row of a tile is (token, index head). A Config has kRows rows, kThreads threads, and kRowChunks
// chunks of 16 bytes in a row.
#pragma once

#include <cuda_runtime.h>

#include "params.h"
#include "schedule.h"
#include "smxx/common/async_copy.cuh"

namespace msa {

// Query tokens [begin, end) of a thread block, and the first of its key blocks.
struct ScoreTile {
  int begin;
  int end;
  int unit_begin;

  __device__ __forceinline__ explicit ScoreTile(const ScoreSchedule& schedule)
      : begin(schedule.token_begin +
              static_cast<int>(blockIdx.x % schedule.num_tiles) * schedule.tokens_per_tile),
        end(min(begin + schedule.tokens_per_tile, schedule.token_end)),
        unit_begin(blockIdx.x / schedule.num_tiles * schedule.blocks_per_unit) {}
};

// All threads copy 16 bytes of each of their rows to `address_of(row)`; zeros past the last token.
template <typename Element, typename Config, typename Address>
__device__ __forceinline__ void copy_queries(const SelectParams& params, const ScoreTile& tile,
                                             Address address_of) {
  constexpr int kCopyRows = Config::kThreads / Config::kRowChunks;
  const int copy_chunk = threadIdx.x % Config::kRowChunks;
  const Element* source = static_cast<const Element*>(params.index_query);
  const int num_rows = (tile.end - tile.begin) * params.num_heads;
#pragma unroll 4
  for (int row = threadIdx.x / Config::kRowChunks; row < Config::kRows; row += kCopyRows) {
    const bool valid = row < num_rows;
    const int token = tile.begin + (valid ? row / params.num_heads : 0);
    const int head = valid ? row % params.num_heads : 0;
    copy_async_16(address_of(row),
                  source + token * params.query_token_stride + head * params.query_head_stride +
                      copy_chunk * 8,
                  valid);
  }
}

// The position of every row among its sequence's keys; that of token 0 would be `position_offset`.
template <typename Config>
__device__ __forceinline__ void store_positions(int* row_position, const SelectParams& params,
                                                const ScoreTile& tile, int position_offset) {
  for (int row = threadIdx.x; row < Config::kRows; row += Config::kThreads) {
    row_position[row] = position_offset + tile.begin + row / params.num_heads;
  }
}

}  // namespace msa
