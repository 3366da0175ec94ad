// Block lists by position alone: see ../../../README.md for the meaning, ../README.md for the plan.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace msa {

// Writes params.block_indices. Asynchronous on `stream`; reads nothing on the host, allocates
// nothing. Throws std::runtime_error on unsupported sizes or a CUDA error.
void launch_structured_blocks(const StructuredParams& params, cudaStream_t stream);

}  // namespace msa
