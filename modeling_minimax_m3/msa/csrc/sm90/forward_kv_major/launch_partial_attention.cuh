// Definition of launch_partial_attention, for the instantiation files.
#pragma once

#include "partial_attention.h"
#include "partial_attention_wgmma.cuh"
#include "smxx/common/launch.h"

namespace msa::sm90 {

template <typename Element>
void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream) {
  using Config = ForwardKvConfig;
  launch_kernel(partial_attention_kernel<Element, Config>, tile_grid(params, schedule),
                Config::kThreads, sizeof(KvMajorStorage), stream, params, schedule);
}

}  // namespace msa::sm90
