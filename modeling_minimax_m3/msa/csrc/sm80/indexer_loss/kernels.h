// The large kernels of the indexer's loss, for smxx/indexer_loss/indexer_loss.h.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/indexer_loss/indexer_loss.h"

namespace msa::sm80 {

// A BlockTermsLauncher and an IndexGradientsLauncher. They throw std::runtime_error on an
// unsupported head dimension or a CUDA error.
void launch_block_terms(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                        LossPass pass, cudaStream_t stream);
void launch_index_gradients(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                            cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element, int kHeadDim>
void launch_block_terms(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                        LossPass pass, cudaStream_t stream);
template <typename Element, int kIndexDim>
void launch_index_gradients(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                            cudaStream_t stream);

}  // namespace msa::sm80
