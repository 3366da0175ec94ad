// Definition of launch_block_scores, for the instantiation files.
#pragma once

#include "block_scores.h"
#include "block_scores_mma.cuh"
#include "smxx/selection/launch_score_kernel.h"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_block_scores(const SelectParams& params, const ScoreSchedule& schedule,
                         cudaStream_t stream) {
  using Config = ScoreConfig<kHeadDim>;
  launch_score_kernel<Config>(block_scores_kernel<Element, Config>, params, schedule, stream);
}

}  // namespace msa::sm80
