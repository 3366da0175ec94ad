// Launches of kernels that keep states and scales in shared memory.
#pragma once

#include <cuda_runtime.h>

#include "few_tokens.cuh"
#include "smxx/common/cuda_check.h"
#include "smxx/common/dependent_launch.cuh"

namespace msa::few_tokens {

// Of a thread block's shared memory, what every GPU from compute capability 8.0 on has. With more,
// fewer thread blocks would fit a multiprocessor.
constexpr int kMostStagedBytes = 72 << 10;

template <auto kKernel, typename Params>
void launch_staged(int blocks, int shared_bytes, cudaStream_t stream, const Params& params) {
  MSA_CHECK_CUDA(
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostStagedBytes));
  launch_beside(kKernel, supports_early_launch<kKernel>(), dim3(blocks), kThreads, shared_bytes,
                stream, params);
}

}  // namespace msa::few_tokens
