// Definitions of the launch functions that have instantiations.
#pragma once

#include "../../common/cuda_check.h"
#include "block_terms.cuh"
#include "combine_index_query.cuh"
#include "index_gradients.cuh"
#include "indexer_loss.h"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_block_terms(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                        LossPass pass, cudaStream_t stream) {
  auto* kernel = pass == LossPass::kValue ? block_terms_kernel<Element, kHeadDim, false>
                                          : block_terms_kernel<Element, kHeadDim, true>;
  const int shared_bytes =
      IndexerLossConfig::shared_bytes(params.attention.block_size, kHeadDim, params.index_dim);
  MSA_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<schedule.max_tiles, IndexerLossConfig::kThreads, shared_bytes, stream>>>(params,
                                                                                    schedule);
  MSA_CHECK_LAUNCH();
}

template <typename Element, int kIndexDim>
void launch_index_gradients(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                            cudaStream_t stream) {
  using Config = IndexGradientConfig<kIndexDim>;
  using Products = WarpProducts<Element, kIndexDim>;
  auto* kernel = schedule.saved_probabilities == nullptr
                     ? index_gradients_kernel<Element, Config, Products, false>
                     : index_gradients_kernel<Element, Config, Products, true>;
  const int shared_bytes = Config::shared_bytes(params.attention.block_size);
  MSA_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<schedule.max_tiles, Config::kThreads, shared_bytes, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

template <typename Element, int kIndexDim>
void launch_combine_index_query(const IndexerLossParams& params,
                                const IndexerLossSchedule& schedule, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(schedule.lists.token_end - schedule.lists.token_begin) *
                       params.attention.num_kv_heads;
  const auto grid = static_cast<unsigned>((rows + kCombineRowWarps - 1) / kCombineRowWarps);
  combine_index_query_kernel<Element, kIndexDim>
      <<<grid, 32 * kCombineRowWarps, 0, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa::sm80
