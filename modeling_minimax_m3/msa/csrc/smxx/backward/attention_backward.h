// Gradients of attention over selected blocks, KV-major.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"
#include "schedule.h"

namespace msa {

// Bytes of scratch to allocate (16-byte aligned); README.md says what for.
int64_t attention_backward_workspace(const BackwardParams& params);

// Adds up the partial query gradients of a part.
void launch_query_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            cudaStream_t stream);

// Launches the main kernel for `part`: all of its tiles. The partial query gradients of the part
// `before`, unless it is nullptr, are complete, and this launcher adds them up as well.
using BlockGradientsLauncher = void (*)(const BackwardParams&, const BackwardSchedule& part,
                                        const BackwardSchedule* before, cudaStream_t);

// Writes params.grad_query, grad_key and grad_value; results repeat bit for bit. Asynchronous on
// `stream`; reads nothing on the host, allocates nothing. Throws std::runtime_error on unsupported
// sizes, a short workspace or a CUDA error.
void launch_attention_backward(const BackwardParams& params,
                               BlockGradientsLauncher launch_gradients, void* workspace,
                               int64_t workspace_bytes, cudaStream_t stream);

}  // namespace msa
