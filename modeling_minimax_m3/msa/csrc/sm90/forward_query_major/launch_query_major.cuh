// Definition of launch_query_major, for the instantiation files.
#pragma once

#include <algorithm>
#include <bit>

#include "query_major.h"
#include "query_major_wgmma.cuh"
#include "sm90/ptx/tensor_map.h"
#include "smxx/common/device.h"
#include "smxx/common/launch.h"
#include "smxx/common/logarithms.h"

namespace msa::sm90 {

template <typename Element>
void launch_query_major(const ForwardParams& params, const TileOrder* order, cudaStream_t stream) {
  using Config = QueryMajorConfig;
  // Keys and values: 64 channels, tokens, panels, heads; a box is one block of one head.
  auto block_map = [&](const void* base, int64_t token_stride, int64_t head_stride) {
    return make_tensor_map<4>({base,
                               {64, static_cast<uint64_t>(params.total_k), Config::kPanels,
                                static_cast<uint64_t>(params.num_kv_heads)},
                               {token_stride, 64, head_stride},
                               {64, Config::kBlockSize, Config::kPanels, 1}},
                              params.dtype);
  };
  QueryMajorArguments arguments;
  arguments.params = params;
  arguments.key = block_map(params.key, params.key_token_stride, params.key_head_stride);
  arguments.value = block_map(params.value, params.value_token_stride, params.value_head_stride);
  // Queries: 64 channels, heads, tokens, panels; a box is a tile of tokens of one key/value head.
  arguments.query = make_tensor_map<4>({params.query,
                                        {64, static_cast<uint64_t>(params.num_heads),
                                         static_cast<uint64_t>(params.total_q), Config::kPanels},
                                        {params.query_head_stride, params.query_token_stride, 64},
                                        {64, kQHeadsPerKv, kTileTokens, Config::kPanels}},
                                       params.dtype);
  arguments.scale_log2 = scale_log2(params.softmax_scale);
  arguments.num_tiles = (params.total_q + kTileTokens - 1) / kTileTokens * params.num_kv_heads;
  arguments.entry_count =
      static_cast<int>(std::bit_ceil(static_cast<unsigned>(kTileTokens * params.topk)));
  arguments.num_slots = Config::slots(arguments.entry_count);
  if (order != nullptr) {
    arguments.tiles = order->query_tiles;
    arguments.num_listed = order->num_query_tiles;
    arguments.next_listed = order->next_query_tile;
  }

  const int grid = std::min(num_multiprocessors(), arguments.num_tiles);
  launch_kernel(query_major_kernel<Element, Config>, grid, Config::kThreads,
                Config::shared_bytes(arguments.num_slots, arguments.entry_count), stream,
                arguments);
}

}  // namespace msa::sm90
