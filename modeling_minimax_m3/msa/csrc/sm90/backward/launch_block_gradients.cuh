// Definition of launch_block_gradients, for the instantiation files.
#pragma once

#include <algorithm>

#include "../../common/cuda_check.h"
#include "attention_backward.h"
#include "block_gradients.cuh"
#include "tensor_map.h"

namespace msa::sm90 {

template <typename Element>
void launch_block_gradients(const BackwardParams& params, const sm80::BackwardSchedule& schedule,
                            cudaStream_t stream) {
  using Config = BackwardConfig;
  auto* kernel = block_gradients_kernel<Element, Config>;
  MSA_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Config::kSharedBytes));
  int device, num_sms;
  MSA_CHECK_CUDA(cudaGetDevice(&device));
  MSA_CHECK_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));

  const ForwardParams& forward = params.forward;
  const CUtensorMap query_map = make_tensor_map(
      forward.query, forward.dtype, forward.total_q, forward.num_heads, forward.head_dim,
      forward.query_token_stride, forward.query_head_stride, Config::kGroup);
  const CUtensorMap grad_out_map = make_tensor_map(
      params.grad_out, forward.dtype, forward.total_q, forward.num_heads, forward.head_dim,
      params.grad_out_token_stride, params.grad_out_head_stride, Config::kGroup);
  kernel<<<std::min(schedule.max_tiles, num_sms), Config::kThreads, Config::kSharedBytes, stream>>>(
      params, schedule, query_map, grad_out_map);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa::sm90
