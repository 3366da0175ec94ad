// KV-major attention forward on Hopper; the meaning and the workspace are those of
// sm80/forward_kv/attention_forward_kv.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"
#include "../../sm80/forward_kv/schedule.h"

namespace msa::sm90 {

// Writes params.out and params.lse. Asynchronous on `stream`; reads nothing on the host, allocates
// nothing. Needs a device of compute capability 9.0. Head dimension and block size other than 128
// run the portable kernels. Throws std::runtime_error on unsupported sizes, a short workspace or a
// CUDA error.
void launch_attention_forward_kv(const ForwardParams& params, void* workspace,
                                 int64_t workspace_bytes, cudaStream_t stream);

// One launch of the partial attention; each instantiation is compiled in a file of its own.
template <typename Element>
void launch_partial_attention(const ForwardParams& params, const sm80::KvSchedule& schedule,
                              cudaStream_t stream);

}  // namespace msa::sm90
