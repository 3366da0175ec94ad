#include "indexer_loss.h"

#include "../../common/dispatch.h"
#include "config.h"

namespace msa::sm90 {

void launch_indexer_loss(const IndexerLossParams& params, sm80::LossPass pass, void* workspace,
                         int64_t workspace_bytes, cudaStream_t stream) {
  using Shape = IndexerLossShape;
  const ForwardParams& attention = params.attention;
  sm80::IndexerLossKernels kernels = sm80::indexer_loss_kernels();
  if (params.index_dim == Shape::kHeadDim && attention.block_size == Shape::kBlockSize) {
    kernels.launch_index_gradients = [](const IndexerLossParams& params,
                                        const sm80::IndexerLossSchedule& schedule,
                                        cudaStream_t stream) {
      dispatch_dtype(params.attention.dtype, [&](auto element) {
        launch_index_gradients<decltype(element)>(params, schedule, stream);
      });
    };
    if (attention.head_dim == Shape::kHeadDim &&
        attention.num_heads == attention.num_kv_heads * Shape::kGroup) {
      kernels.launch_block_terms = [](const IndexerLossParams& params,
                                      const sm80::IndexerLossSchedule& schedule,
                                      sm80::LossPass pass, cudaStream_t stream) {
        dispatch_dtype(params.attention.dtype, [&](auto element) {
          launch_block_terms<decltype(element)>(params, schedule, pass, stream);
        });
      };
    }
  }
  sm80::launch_indexer_loss(params, pass, kernels, workspace, workspace_bytes, stream);
}

}  // namespace msa::sm90
