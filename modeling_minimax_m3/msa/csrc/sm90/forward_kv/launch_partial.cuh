// Definition of launch_partial_attention, for the instantiation files.
#pragma once

#include "../../common/cuda_check.h"
#include "attention_forward_kv.h"
#include "partial_attention.cuh"

namespace msa::sm90 {

template <typename Element>
void launch_partial_attention(const ForwardParams& params, const sm80::KvSchedule& schedule,
                              cudaStream_t stream) {
  using Config = ForwardKvConfig;
  auto* kernel = partial_attention_kernel<Element, Config>;
  MSA_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Config::kSharedBytes));
  kernel<<<sm80::tile_grid(params, schedule), Config::kThreads, Config::kSharedBytes, stream>>>(
      params, schedule);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa::sm90
