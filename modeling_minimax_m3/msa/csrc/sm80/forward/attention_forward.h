// Attention forward for prefill: see ../../../README.md for the meaning, ../README.md for the plan.
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"

namespace msa::sm80 {

// Writes params.out and params.lse. Asynchronous on `stream`; reads nothing on the host, allocates
// nothing. Throws std::runtime_error on unsupported sizes or a CUDA error.
void launch_attention_forward(const ForwardParams& params, cudaStream_t stream);

// One launch of the kernel; each instantiation is compiled in a file of its own.
template <typename Element, int kHeadDim>
void launch_forward_kernel(const ForwardParams& params, cudaStream_t stream);

}  // namespace msa::sm80
