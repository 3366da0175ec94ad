#include "block_gradients.h"

#include "config.h"
#include "smxx/common/dispatch.h"

namespace msa::sm90 {

bool supports_block_gradients(const BackwardParams& params) {
  const ForwardParams& forward = params.forward;
  return forward.head_dim == BackwardConfig::kHeadDim &&
         forward.block_size == BackwardConfig::kBlockSize &&
         forward.num_heads == forward.num_kv_heads * BackwardConfig::kQHeadsPerKv &&
         // The copy engine cannot repeat a row.
         forward.query_token_stride > 0 && forward.query_head_stride > 0 &&
         params.grad_out_token_stride > 0 && params.grad_out_head_stride > 0;
}

void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            const BackwardSchedule* before, cudaStream_t stream) {
  dispatch_dtype(params.forward.dtype, [&](auto element) {
    launch_block_gradients<decltype(element)>(params, schedule, before, stream);
  });
}

}  // namespace msa::sm90
