#include "kernels.h"

#include "smxx/common/dispatch.h"

namespace msa::sm80 {

void launch_block_terms(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                        LossPass pass, cudaStream_t stream) {
  dispatch(params.attention.dtype, params.attention.head_dim, [&](auto element, auto head_dim) {
    launch_block_terms<decltype(element), head_dim.value>(params, schedule, pass, stream);
  });
}

void launch_index_gradients(const IndexerLossParams& params, const IndexerLossSchedule& schedule,
                            cudaStream_t stream) {
  dispatch(params.attention.dtype, params.index_dim, [&](auto element, auto index_dim) {
    launch_index_gradients<decltype(element), index_dim.value>(params, schedule, stream);
  });
}

}  // namespace msa::sm80
