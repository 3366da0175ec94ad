// Definitions of launch_partial_attention and launch_combine_partials, for the instantiation files.
#pragma once

#include "../../common/cuda_check.h"
#include "attention_forward_kv.h"
#include "combine_partials.cuh"
#include "partial_attention.cuh"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream) {
  using Config = ForwardKvConfig<kHeadDim>;
  auto* attend = partial_attention_kernel<Element, Config>;
  const int shared_bytes = Config::shared_bytes(params.block_size);
  MSA_CHECK_CUDA(
      cudaFuncSetAttribute(attend, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  attend<<<tile_grid(params, schedule), Config::kThreads, shared_bytes, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

template <typename Element, int kHeadDim>
void launch_combine_partials(const ForwardParams& params, const KvSchedule& schedule,
                             cudaStream_t stream) {
  const auto grid =
      static_cast<unsigned>((combine_pieces(params, schedule) + kCombineWarps - 1) / kCombineWarps);
  combine_partials_kernel<Element, kHeadDim>
      <<<grid, 32 * kCombineWarps, 0, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa::sm80
