// Definition of launch_partial_attention, for the instantiation files.
#pragma once

#include "partial_attention.h"
#include "partial_attention_mma.cuh"
#include "smxx/common/launch.h"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream) {
  using Config = ForwardKvConfig<kHeadDim>;
  launch_kernel(partial_attention_kernel<Element, Config>, tile_grid(params, schedule),
                Config::kThreads, Config::shared_bytes(params.block_size), stream, params,
                schedule);
}

}  // namespace msa::sm80
