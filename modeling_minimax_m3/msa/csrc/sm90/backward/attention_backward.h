// Attention backward on Hopper; the meaning and the workspace are those of
// sm80/backward/attention_backward.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"
#include "../../sm80/backward/schedule.h"

namespace msa::sm90 {

// Writes params.grad_query, grad_key and grad_value. Asynchronous on `stream`; reads nothing on the
// host, allocates nothing. Needs a device of compute capability 9.0. Shapes other than head
// dimension 128, block size 128 and 16 query heads a key/value head run the portable kernels.
// Throws std::runtime_error on unsupported sizes, a short workspace or a CUDA error.
void launch_attention_backward(const BackwardParams& params, void* workspace,
                               int64_t workspace_bytes, cudaStream_t stream);

// The main kernel of one part, and the sums of the part before, unless it is nullptr; each
// instantiation is compiled in a file of its own.
template <typename Element>
void launch_block_gradients(const BackwardParams& params, const sm80::BackwardSchedule& schedule,
                            const sm80::BackwardSchedule* before, cudaStream_t stream);

}  // namespace msa::sm90
