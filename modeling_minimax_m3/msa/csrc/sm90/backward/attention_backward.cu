#include "attention_backward.h"

#include "../../common/dispatch.h"
#include "../../sm80/backward/attention_backward.h"
#include "config.h"

namespace msa::sm90 {

namespace {

bool fits(const BackwardParams& params) {
  const ForwardParams& forward = params.forward;
  return forward.head_dim == BackwardConfig::kHeadDim &&
         forward.block_size == BackwardConfig::kBlockSize &&
         forward.num_heads == forward.num_kv_heads * BackwardConfig::kGroup &&
         // The copy engine cannot repeat a row.
         forward.query_token_stride > 0 && forward.query_head_stride > 0 &&
         params.grad_out_token_stride > 0 && params.grad_out_head_stride > 0;
}

}  // namespace

void launch_attention_backward(const BackwardParams& params, void* workspace,
                               int64_t workspace_bytes, cudaStream_t stream) {
  if (!fits(params)) {
    sm80::launch_attention_backward(params, workspace, workspace_bytes, stream);
    return;
  }
  auto launch_gradients = [](const BackwardParams& params, const sm80::BackwardSchedule& schedule,
                             const sm80::BackwardSchedule* before, cudaStream_t stream) {
    dispatch_dtype(params.forward.dtype, [&](auto element) {
      launch_block_gradients<decltype(element)>(params, schedule, before, stream);
    });
  };
  sm80::launch_backward(params, workspace, workspace_bytes, launch_gradients, stream);
}

}  // namespace msa::sm90
