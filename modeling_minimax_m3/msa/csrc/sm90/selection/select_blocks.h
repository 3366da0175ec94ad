// Block selection for prefill on Hopper; the meaning and the workspace are those of
// sm80/selection/select_blocks.h.
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"
#include "../../sm80/selection/schedule.h"

namespace msa::sm90 {

// Writes params.block_indices. Asynchronous on `stream`; reads nothing on the host, allocates
// nothing. Needs a device of compute capability 9.0. Throws std::runtime_error on unsupported
// sizes, a short workspace or a CUDA error.
void launch_select_blocks(const SelectParams& params, cudaStream_t stream);

// One launch of the score kernel; each instantiation is compiled in a file of its own.
template <typename Element, int kHeadDim>
void launch_block_scores(const SelectParams& params, const sm80::ScoreSchedule& schedule,
                         cudaStream_t stream);

}  // namespace msa::sm90
