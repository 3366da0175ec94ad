// Attention forward for prefill on Hopper: chooses the loop order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"

namespace msa::sm90 {

// Bytes of scratch to allocate (16-byte aligned); 0 when the call runs query-major, without any.
int64_t attention_forward_workspace(const ForwardParams& params);

// Writes params.out and params.lse. `workspace_bytes` is what attention_forward_workspace returned
// for the same sizes. Asynchronous on `stream`; reads nothing on the host, allocates nothing. Needs
// a device of compute capability 9.0. Throws std::runtime_error on unsupported sizes or a CUDA
// error.
void launch_attention_forward(const ForwardParams& params, void* workspace, int64_t workspace_bytes,
                              cudaStream_t stream);

}  // namespace msa::sm90
