// Attention forward for prefill on Hopper: its query-major and KV-major kernels under the choice of
// sm80/forward_order, or the portable ones where a call has sizes that they do not take.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"

namespace msa::sm90 {

// Writes params.out and params.lse. `workspace_bytes` is what sm80::attention_forward_workspace
// returned for the same sizes. Asynchronous on `stream`; reads nothing on the host, allocates
// nothing. Needs a device of compute capability 9.0. Throws std::runtime_error on unsupported sizes
// or a CUDA error.
void launch_attention_forward(const ForwardParams& params, void* workspace, int64_t workspace_bytes,
                              cudaStream_t stream);

}  // namespace msa::sm90
