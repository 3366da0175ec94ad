// Definition of launch_block_scores, for the instantiation files.
#pragma once

#include "../../common/cuda_check.h"
#include "block_scores.cuh"
#include "launch_scores.h"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_block_scores(const SelectParams& params, const ScoreSchedule& schedule,
                         cudaStream_t stream) {
  using Config = ScoreConfig<kHeadDim>;
  auto* kernel = block_scores_kernel<Element, Config>;
  MSA_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Config::kSharedBytes));
  const auto grid = static_cast<unsigned>(schedule.num_units) * schedule.num_tiles;
  kernel<<<grid, Config::kThreads, Config::kSharedBytes, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa::sm80
