// KV-major attention forward: the results of sm80/forward/attention_forward.h, faster where
// neighbouring queries choose different blocks. 16 query heads per key/value head only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"
#include "schedule.h"

namespace msa::sm80 {

// Bytes of scratch to allocate (16-byte aligned): partial outputs of all queries at once, or 1 GB
// of them if that is less, and integers.
int64_t attention_forward_kv_workspace(const ForwardParams& params);

// Writes params.out and params.lse. Asynchronous on `stream`; reads nothing on the host, allocates
// nothing. Throws std::runtime_error on unsupported sizes, a short workspace or a CUDA error.
void launch_attention_forward_kv(const ForwardParams& params, void* workspace,
                                 int64_t workspace_bytes, cudaStream_t stream);

// The kernels of one part, all of its tiles and all of its rows; each instantiation is compiled in
// a file of its own.
template <typename Element, int kHeadDim>
void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream);
template <typename Element, int kHeadDim>
void launch_combine_partials(const ForwardParams& params, const KvSchedule& schedule,
                             cudaStream_t stream);

// The same with another kernel for the partial outputs.
using PartialAttentionLauncher = void (*)(const ForwardParams&, const KvSchedule&, cudaStream_t);
void launch_forward_kv(const ForwardParams& params, void* workspace, int64_t workspace_bytes,
                       PartialAttentionLauncher launch_partial, cudaStream_t stream);

// The portable kernel for the partial outputs, for any supported type and head dimension.
void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream);

}  // namespace msa::sm80
