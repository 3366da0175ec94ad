#include "kernels.h"

#include "config.h"
#include "smxx/common/dispatch.h"

namespace msa::sm90 {

bool supports_index_gradients(const IndexerLossParams& params) {
  return params.index_dim == IndexerLossShape::kHeadDim &&
         params.attention.block_size == IndexerLossShape::kBlockSize;
}

bool supports_block_terms(const IndexerLossParams& params) {
  const ForwardParams& attention = params.attention;
  return supports_index_gradients(params) && attention.head_dim == IndexerLossShape::kHeadDim &&
         attention.num_heads == attention.num_kv_heads * IndexerLossShape::kQHeadsPerKv;
}

void launch_block_terms(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                        LossPass pass, cudaStream_t stream) {
  dispatch_dtype(params.attention.dtype, [&](auto element) {
    launch_block_terms<decltype(element)>(params, schedule, pass, stream);
  });
}

void launch_index_gradients(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                            cudaStream_t stream) {
  dispatch_dtype(params.attention.dtype, [&](auto element) {
    launch_index_gradients<decltype(element)>(params, schedule, stream);
  });
}

}  // namespace msa::sm90
