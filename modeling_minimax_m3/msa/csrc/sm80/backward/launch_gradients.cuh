// Definition of launch_block_gradients, for the instantiation files.
#pragma once

#include "../../common/cuda_check.h"
#include "attention_backward.h"
#include "block_gradients.cuh"

namespace msa::sm80 {

template <typename Element, typename Config>
void launch_block_gradients_kernel(const BackwardParams& params, const BackwardSchedule& schedule,
                                   cudaStream_t stream) {
  auto* kernel = block_gradients_kernel<Element, Config>;
  MSA_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Config::kSharedBytes));
  kernel<<<schedule.max_tiles, Config::kThreads, Config::kSharedBytes, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

template <typename Element, int kHeadDim>
void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            cudaStream_t stream) {
  if (params.forward.block_size == 64) {
    launch_block_gradients_kernel<Element, BackwardConfig<kHeadDim, 64>>(params, schedule, stream);
  } else {
    launch_block_gradients_kernel<Element, BackwardConfig<kHeadDim, 128>>(params, schedule, stream);
  }
}

}  // namespace msa::sm80
