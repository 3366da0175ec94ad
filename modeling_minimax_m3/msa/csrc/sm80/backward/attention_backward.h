// Gradients of attention over selected blocks, KV-major.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"
#include "schedule.h"

namespace msa::sm80 {

// Bytes of scratch to allocate (16-byte aligned); README.md says what for.
int64_t attention_backward_workspace(const BackwardParams& params);

// Writes params.grad_query, grad_key and grad_value; results repeat bit for bit. Asynchronous on
// `stream`; reads nothing on the host, allocates nothing. Throws std::runtime_error on unsupported
// sizes, a short workspace or a CUDA error.
void launch_attention_backward(const BackwardParams& params, void* workspace,
                               int64_t workspace_bytes, cudaStream_t stream);

// The main kernel of one part: all of its tiles. Each instantiation is compiled in a file of its
// own.
template <typename Element, int kHeadDim>
void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            cudaStream_t stream);

// launch_attention_backward with another main kernel. `launch_gradients` launches it for `part`;
// the partial gradients of `before`, unless it is nullptr, are complete and are added up by the
// way.
using BlockGradientsLauncher = void (*)(const BackwardParams&, const BackwardSchedule& part,
                                        const BackwardSchedule* before, cudaStream_t);
void launch_backward(const BackwardParams& params, void* workspace, int64_t workspace_bytes,
                     BlockGradientsLauncher launch_gradients, cudaStream_t stream);

}  // namespace msa::sm80
