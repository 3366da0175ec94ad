// Definition of launch_query_major, for the instantiation files.
#pragma once

#include <bit>

#include "query_major.h"
#include "query_major_mma.cuh"
#include "smxx/common/launch.h"
#include "smxx/common/logarithms.h"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_query_major(const ForwardParams& params, const TileOrder* order, cudaStream_t stream) {
  using Config = ForwardConfig<kHeadDim>;
  const unsigned q_heads_per_kv = params.num_heads / params.num_kv_heads;
  ForwardSchedule schedule;
  schedule.q_heads_shift = std::countr_zero(q_heads_per_kv);
  const int tile_tokens = Config::kRows / q_heads_per_kv;
  schedule.num_tiles = (params.total_q + tile_tokens - 1) / tile_tokens;
  schedule.entry_count =
      static_cast<int>(std::bit_ceil(static_cast<unsigned>(tile_tokens * params.topk)));
  schedule.is_query_major = order == nullptr ? nullptr : order->is_query_major;
  schedule.scale_log2 = scale_log2(params.softmax_scale);

  const int shared_bytes = Config::kStages * Config::kStageBytes + schedule.entry_count * 4;
  const auto grid = static_cast<unsigned>(schedule.num_tiles) * params.num_kv_heads;
  launch_kernel(query_major_kernel<Element, Config>, grid, Config::kThreads, shared_bytes, stream,
                params, schedule);
}

}  // namespace msa::sm80
