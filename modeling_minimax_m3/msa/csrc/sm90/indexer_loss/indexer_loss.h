// The indexer's loss on Hopper; the meaning and the workspace are those of
// sm80/indexer_loss/indexer_loss.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"
#include "../../sm80/indexer_loss/indexer_loss.h"

namespace msa::sm90 {

// As sm80::launch_indexer_loss. Needs a device of compute capability 9.0. Shapes other than
// IndexerLossShape run the portable kernels.
void launch_indexer_loss(const IndexerLossParams& params, sm80::LossPass pass, void* workspace,
                         int64_t workspace_bytes, cudaStream_t stream);

// One launch of each kernel; each instantiation is compiled in a file of its own.
template <typename Element>
void launch_block_terms(const IndexerLossParams& params, const sm80::IndexerLossSchedule& schedule,
                        sm80::LossPass pass, cudaStream_t stream);
template <typename Element>
void launch_index_gradients(const IndexerLossParams& params,
                            const sm80::IndexerLossSchedule& schedule, cudaStream_t stream);

}  // namespace msa::sm90
