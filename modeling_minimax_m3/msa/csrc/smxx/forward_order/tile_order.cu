#include "tile_order.h"

#include <bit>

#include "smxx/common/cuda_check.h"
#include "smxx/common/workspace.h"
#include "smxx/forward_query_major/tile_union.cuh"

namespace msa {

namespace {

constexpr int kWarps = 8;

int64_t num_tiles(const ForwardParams& params) {
  return (static_cast<int64_t>(params.total_q) + kTileTokens - 1) / kTileTokens *
         params.num_kv_heads;
}

// Counters: query-major tiles, the next of them, then a flag for each part.
int64_t counter_bytes(const ForwardParams& params, int64_t part_tokens) {
  return align((2 + (params.total_q + part_tokens - 1) / part_tokens) * 4);
}

struct OrderOutput {
  uint8_t* is_query_major;
  int32_t* query_tiles;
  int32_t* num_query_tiles;
  int32_t* has_kv;
};

// One warp a tile.
__global__ void __launch_bounds__(32 * kWarps)
    choose_order_kernel(const ForwardParams params, const OrderRule rule, const OrderOutput output,
                        int num_tiles, int part_tokens, int entry_count) {
  extern __shared__ uint32_t shared_entries[];
  __shared__ TileTokens shared_tokens[kWarps];
  __shared__ int chosen[kWarps];
  __shared__ int first_place;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int number = static_cast<int>(blockIdx.x) * kWarps + warp;
  int goes_query_major = 0;
  if (number < num_tiles) {
    uint32_t* entries = shared_entries + warp * entry_count;
    const int tile = number / params.num_kv_heads;
    const int num_blocks = build_tile_union(params, tile, number % params.num_kv_heads,
                                            shared_tokens[warp], entries, entry_count, lane);
    const uint32_t low = (1u << rule.step_tokens) - 1;
    int steps = 0, pairs = 0;
    for (int i = lane; i < num_blocks; i += 32) {
      const uint32_t tokens = union_tokens(entries[i]);
      pairs += __popc(tokens);
      steps += ((tokens & low) != 0) + ((tokens & ~low) != 0);
    }
    steps = __reduce_add_sync(0xffffffffu, steps);
    pairs = __reduce_add_sync(0xffffffffu, pairs);
    goes_query_major = pairs >= rule.step_cost * steps + rule.load_cost * num_blocks;
    if (lane == 0) {
      output.is_query_major[number] = goes_query_major;
      // Every writer writes the same.
      if (!goes_query_major) output.has_kv[tile * kTileTokens / part_tokens] = 1;
    }
  }
  if (lane == 0) chosen[warp] = goes_query_major;
  __syncthreads();
  int place = 0, total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) place = total;
    total += chosen[i];
  }
  if (threadIdx.x == 0 && total > 0) first_place = atomicAdd(output.num_query_tiles, total);
  __syncthreads();
  if (lane == 0 && goes_query_major) output.query_tiles[first_place + place] = number;
}

}  // namespace

int64_t tile_order_workspace(const ForwardParams& params, int64_t part_tokens) {
  const int64_t tiles = num_tiles(params);
  return counter_bytes(params, part_tokens) + align(tiles * 4) + align(tiles);
}

TileOrder launch_choose_order(const ForwardParams& params, OrderRule rule, void* workspace,
                              int64_t part_tokens, cudaStream_t stream) {
  const int64_t tiles = num_tiles(params);
  auto* counters = static_cast<int32_t*>(workspace);
  auto* lists = reinterpret_cast<unsigned char*>(workspace) + counter_bytes(params, part_tokens);
  OrderOutput output;
  output.num_query_tiles = counters;
  output.has_kv = counters + 2;
  output.query_tiles = reinterpret_cast<int32_t*>(lists);
  output.is_query_major = lists + align(tiles * 4);
  MSA_CHECK_CUDA(cudaMemsetAsync(counters, 0, counter_bytes(params, part_tokens), stream));
  const int entry_count =
      static_cast<int>(std::bit_ceil(static_cast<unsigned>(kTileTokens * params.topk)));
  const auto grid = static_cast<unsigned>((tiles + kWarps - 1) / kWarps);
  choose_order_kernel<<<grid, 32 * kWarps, kWarps * entry_count * 4, stream>>>(
      params, rule, output, static_cast<int>(tiles), static_cast<int>(part_tokens), entry_count);
  MSA_CHECK_LAUNCH();
  return {output.is_query_major, output.query_tiles, output.num_query_tiles, counters + 1,
          output.has_kv};
}

}  // namespace msa
