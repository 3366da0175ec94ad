// Definitions of launch_block_terms and launch_index_gradients, for the instantiation files.
#pragma once

#include "block_terms_wgmma.cuh"
#include "kernels.h"
#include "smxx/common/launch.h"
#include "smxx/indexer_loss/index_gradients.cuh"
#include "warpgroup_products.cuh"

namespace msa::sm90 {

template <typename Element>
void launch_block_terms(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                        LossPass pass, cudaStream_t stream) {
  auto* kernel = pass == LossPass::kValue ? block_terms_kernel<Element, false>
                                          : block_terms_kernel<Element, true>;
  launch_kernel(kernel, schedule.max_tiles, IndexerLossConfig::kThreads,
                IndexerLossShape::kSharedBytes, stream, params, schedule);
}

template <typename Element>
void launch_index_gradients(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                            cudaStream_t stream) {
  using Config = IndexGradientConfig<IndexerLossShape::kHeadDim>;
  using Products = WarpgroupProducts<Element>;
  auto* kernel = schedule.saved_probs == nullptr
                     ? index_gradients_kernel<Element, Config, Products, false>
                     : index_gradients_kernel<Element, Config, Products, true>;
  launch_kernel(kernel, schedule.max_tiles, Config::kThreads,
                Config::shared_bytes(IndexerLossShape::kBlockSize), stream, params, schedule);
}

}  // namespace msa::sm90
