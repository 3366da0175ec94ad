// Block selection for prefill: see ../../../README.md for the meaning, ../README.md for the plan.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"
#include "schedule.h"

namespace msa {

// Floats of scratch to allocate: enough for all queries at once, or 64 Mi (256 MB) if that is less.
// More than that only where the scores of a single tile of queries need it: beyond 2^18 key blocks.
int64_t select_blocks_workspace(const SelectParams& params);

// Writes params.block_indices: cuts the queries to fit the workspace, then scores and top-k for
// each part. Asynchronous on `stream`; reads nothing on the host, allocates
// nothing. Throws std::runtime_error on unsupported sizes, a short workspace or a CUDA error.
void launch_select_blocks(const SelectParams& params, const ScoreKernel& kernel,
                          cudaStream_t stream);

}  // namespace msa
