// The best index score of every key block, for smxx/selection/select_blocks.h.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/selection/schedule.h"

namespace msa::sm80 {

// One launch. Throws std::runtime_error on an unsupported head dimension or a CUDA error.
void launch_block_scores(const SelectParams& params, const ScoreSchedule& schedule,
                         cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element, int kHeadDim>
void launch_block_scores(const SelectParams& params, const ScoreSchedule& schedule,
                         cudaStream_t stream);

}  // namespace msa::sm80
