// Definition of launch_forward_q_kernel, for the instantiation files.
#pragma once

#include <algorithm>
#include <bit>

#include "../../common/cuda_check.h"
#include "../../common/device.h"
#include "../ptx/tensor_map.h"
#include "attention_forward_q.cuh"
#include "attention_forward_q.h"

namespace msa::sm90 {

template <typename Element>
void launch_forward_q_kernel(const ForwardParams& params, const sm80::TileOrder* order,
                             cudaStream_t stream) {
  using Config = ForwardQConfig;
  constexpr double kLog2E = 1.44269504088896340736;
  // Keys and values: 64 channels, tokens, panels, heads; a box is one block of one head.
  auto block_map = [&](const void* base, int64_t token_stride, int64_t head_stride) {
    return make_tensor_map<4>({base,
                               {64, static_cast<uint64_t>(params.total_k), Config::kPanels,
                                static_cast<uint64_t>(params.num_kv_heads)},
                               {token_stride, 64, head_stride},
                               {64, Config::kBlockSize, Config::kPanels, 1}},
                              params.dtype);
  };
  ForwardQArguments arguments;
  arguments.params = params;
  arguments.key = block_map(params.key, params.key_token_stride, params.key_head_stride);
  arguments.value = block_map(params.value, params.value_token_stride, params.value_head_stride);
  // Queries: 64 channels, heads, tokens, panels; a box is a tile of tokens of one group.
  arguments.query = make_tensor_map<4>({params.query,
                                        {64, static_cast<uint64_t>(params.num_heads),
                                         static_cast<uint64_t>(params.total_q), Config::kPanels},
                                        {params.query_head_stride, params.query_token_stride, 64},
                                        {64, sm80::kGroup, sm80::kTileTokens, Config::kPanels}},
                                       params.dtype);
  arguments.scale_log2 = static_cast<float>(params.softmax_scale * kLog2E);
  arguments.num_tiles =
      (params.total_q + sm80::kTileTokens - 1) / sm80::kTileTokens * params.num_kv_heads;
  arguments.entry_count =
      static_cast<int>(std::bit_ceil(static_cast<unsigned>(sm80::kTileTokens * params.topk)));
  arguments.num_slots = Config::slots(arguments.entry_count);
  if (order != nullptr) {
    arguments.tiles = order->query_tiles;
    arguments.num_listed = order->num_query_tiles;
    arguments.next_listed = order->next_query_tile;
  }

  auto* kernel = attention_forward_q_kernel<Element, Config>;
  const int shared_bytes = Config::shared_bytes(arguments.num_slots, arguments.entry_count);
  MSA_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<std::min(num_multiprocessors(), arguments.num_tiles), Config::kThreads, shared_bytes,
           stream>>>(arguments);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa::sm90
