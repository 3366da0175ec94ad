// The main kernel of the attention backward, for smxx/backward/attention_backward.h.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/backward/schedule.h"

namespace msa::sm80 {

// A BlockGradientsLauncher. Throws std::runtime_error on an unsupported head dimension or a CUDA
// error.
void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            const BackwardSchedule* before, cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element, int kHeadDim>
void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            cudaStream_t stream);

}  // namespace msa::sm80
