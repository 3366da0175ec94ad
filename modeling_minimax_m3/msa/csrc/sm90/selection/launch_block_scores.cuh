// Definition of launch_block_scores, for the instantiation files.
#pragma once

#include "block_scores.h"
#include "block_scores_wgmma.cuh"
#include "smxx/common/launch.h"

namespace msa::sm90 {

template <typename Element, int kHeadDim>
void launch_block_scores(const SelectParams& params, const ScoreSchedule& schedule,
                         cudaStream_t stream) {
  using Config = ScoreConfig<kHeadDim>;
  const auto grid = static_cast<unsigned>(schedule.num_units) * schedule.num_tiles;
  launch_kernel(block_scores_kernel<Element, Config>, grid, Config::kThreads,
                sizeof(ScoreStorage<Config>), stream, params, schedule);
}

}  // namespace msa::sm90
