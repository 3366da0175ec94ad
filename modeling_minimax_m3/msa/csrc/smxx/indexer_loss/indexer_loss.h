// The indexer's loss, KV-major: per query and head, the KL divergence of the indexer's softmax from
// the main attention's mean over the query heads of a key/value head, and its gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"
#include "schedule.h"

namespace msa {

enum class LossPass { kValue, kGradient };

// Bytes of scratch to allocate (16-byte aligned): for all queries at once or 1.25 GB, if that is
// less, and what grows with the keys: integers, and for the gradient 4 bytes per channel of an
// index key.
int64_t indexer_loss_workspace(const IndexerLossParams& params, LossPass pass);

// The kernels of one part, all of its tiles: teacher and student; the second step of the gradient.
using BlockTermsLauncher = void (*)(const IndexerLossParams&, const IndexerLossSchedule&, LossPass,
                                    cudaStream_t);
using IndexGradientsLauncher = void (*)(const IndexerLossParams&, const IndexerLossSchedule&,
                                        cudaStream_t);
struct IndexerLossKernels {
  BlockTermsLauncher launch_block_terms;
  IndexGradientsLauncher launch_index_gradients;
};

// The last step of the gradient for the index queries.
void launch_combine_index_query(const IndexerLossParams& params,
                                const IndexerLossSchedule& schedule, cudaStream_t stream);

// The value writes params.kl, params.index_lse and params.saved_probs, which the gradient
// reads; that writes params.grad_index_query and params.grad_index_key. Asynchronous on `stream`;
// reads nothing on the host, allocates nothing; results repeat bit for bit. Throws
// std::runtime_error on unsupported sizes, a short workspace or a CUDA error.
void launch_indexer_loss(const IndexerLossParams& params, LossPass pass,
                         const IndexerLossKernels& kernels, void* workspace,
                         int64_t workspace_bytes, cudaStream_t stream);

}  // namespace msa
