// One launch of the block-score kernel; each instantiation is compiled in a file of its own.
#pragma once

#include <cuda_runtime_api.h>

#include "schedule.h"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_block_scores(const SelectParams& params, const ScoreSchedule& schedule,
                         cudaStream_t stream);

}  // namespace msa::sm80
