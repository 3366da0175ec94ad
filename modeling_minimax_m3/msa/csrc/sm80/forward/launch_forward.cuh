// Definition of launch_forward_kernel, for the instantiation files.
#pragma once

#include <bit>

#include "../../common/cuda_check.h"
#include "attention_forward.cuh"
#include "attention_forward.h"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_forward_kernel(const ForwardParams& params, const TileOrder* order,
                           cudaStream_t stream) {
  using Config = ForwardConfig<kHeadDim>;
  constexpr double kLog2E = 1.44269504088896340736;
  const unsigned group = params.num_heads / params.num_kv_heads;
  ForwardSchedule schedule;
  schedule.group_shift = std::countr_zero(group);
  const int tile_tokens = Config::kRows / group;
  schedule.num_tiles = (params.total_q + tile_tokens - 1) / tile_tokens;
  schedule.entry_count =
      static_cast<int>(std::bit_ceil(static_cast<unsigned>(tile_tokens * params.topk)));
  schedule.is_query_major = order == nullptr ? nullptr : order->is_query_major;
  schedule.scale_log2 = static_cast<float>(params.softmax_scale * kLog2E);

  auto* kernel = attention_forward_kernel<Element, Config>;
  const int shared_bytes = Config::kStages * Config::kStageBytes + schedule.entry_count * 4;
  MSA_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const auto grid = static_cast<unsigned>(schedule.num_tiles) * params.num_kv_heads;
  kernel<<<grid, Config::kThreads, shared_bytes, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa::sm80
