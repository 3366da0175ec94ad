// Definitions of launch_block_terms and launch_index_gradients, for the instantiation files.
#pragma once

#include "block_terms_mma.cuh"
#include "kernels.h"
#include "smxx/common/launch.h"
#include "warp_products.cuh"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_block_terms(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                        LossPass pass, cudaStream_t stream) {
  auto* kernel = pass == LossPass::kValue ? block_terms_kernel<Element, kHeadDim, false>
                                          : block_terms_kernel<Element, kHeadDim, true>;
  launch_kernel(
      kernel, schedule.max_tiles, IndexerLossConfig::kThreads,
      IndexerLossConfig::shared_bytes(params.attention.block_size, kHeadDim, params.index_dim),
      stream, params, schedule);
}

template <typename Element, int kIndexDim>
void launch_index_gradients(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                            cudaStream_t stream) {
  using Config = IndexGradientConfig<kIndexDim>;
  using Products = WarpProducts<Element, kIndexDim>;
  auto* kernel = schedule.saved_probs == nullptr
                     ? index_gradients_kernel<Element, Config, Products, false>
                     : index_gradients_kernel<Element, Config, Products, true>;
  launch_kernel(kernel, schedule.max_tiles, Config::kThreads,
                Config::shared_bytes(params.attention.block_size), stream, params, schedule);
}

}  // namespace msa::sm80
