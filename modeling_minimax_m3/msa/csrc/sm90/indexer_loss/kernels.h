// The large kernels of the indexer's loss on Hopper, for smxx/indexer_loss/indexer_loss.h.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/indexer_loss/indexer_loss.h"

namespace msa::sm90 {

// Whether the kernels take calls of these sizes, those of IndexerLossShape; the main attention's
// head dimension and its query heads per key/value head matter to the first kernel only.
bool supports_block_terms(const IndexerLossParams& params);
bool supports_index_gradients(const IndexerLossParams& params);

// A BlockTermsLauncher and an IndexGradientsLauncher. They throw std::runtime_error on a CUDA
// error.
void launch_block_terms(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                        LossPass pass, cudaStream_t stream);
void launch_index_gradients(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                            cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element>
void launch_block_terms(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                        LossPass pass, cudaStream_t stream);
template <typename Element>
void launch_index_gradients(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                            cudaStream_t stream);

}  // namespace msa::sm90
