// Definitions of the launch functions that have instantiations.
#pragma once

#include "../../common/cuda_check.h"
#include "../../sm80/indexer_loss/index_gradients.cuh"
#include "block_terms.cuh"
#include "indexer_loss.h"
#include "warpgroup_products.cuh"

namespace msa::sm90 {

template <typename Element>
void launch_block_terms(const IndexerLossParams& params, const sm80::IndexerLossSchedule& schedule,
                        sm80::LossPass pass, cudaStream_t stream) {
  auto* kernel = pass == sm80::LossPass::kValue ? block_terms_kernel<Element, false>
                                                : block_terms_kernel<Element, true>;
  MSA_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      IndexerLossShape::kSharedBytes));
  kernel<<<schedule.max_tiles, sm80::IndexerLossConfig::kThreads, IndexerLossShape::kSharedBytes,
           stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

template <typename Element>
void launch_index_gradients(const IndexerLossParams& params,
                            const sm80::IndexerLossSchedule& schedule, cudaStream_t stream) {
  using Config = sm80::IndexGradientConfig<IndexerLossShape::kHeadDim>;
  using Products = WarpgroupProducts<Element>;
  auto* kernel = schedule.saved_probabilities == nullptr
                     ? sm80::index_gradients_kernel<Element, Config, Products, false>
                     : sm80::index_gradients_kernel<Element, Config, Products, true>;
  constexpr int kSharedBytes = Config::shared_bytes(IndexerLossShape::kBlockSize);
  MSA_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<schedule.max_tiles, Config::kThreads, kSharedBytes, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa::sm90
