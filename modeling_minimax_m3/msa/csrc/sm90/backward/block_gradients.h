// The main kernel of the attention backward on Hopper, for smxx/backward/attention_backward.h.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/backward/schedule.h"

namespace msa::sm90 {

// Whether the kernel takes calls of these sizes: head dimension and block size 128, 16 query heads
// per key/value head, no row that is repeated by a stride of 0.
bool supports_block_gradients(const BackwardParams& params);

// A BlockGradientsLauncher. Throws std::runtime_error on a CUDA error.
void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            const BackwardSchedule* before, cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element>
void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            const BackwardSchedule* before, cudaStream_t stream);

}  // namespace msa::sm90
