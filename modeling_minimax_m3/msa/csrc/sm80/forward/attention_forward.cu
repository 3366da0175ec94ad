#include "attention_forward.h"

#include "../../common/dispatch.h"
#include "../../common/supported.h"
#include "config.h"

namespace msa::sm80 {

void launch_attention_forward_q(const ForwardParams& params, const TileOrder* order,
                                cudaStream_t stream) {
  check_group(params.num_heads, params.num_kv_heads);
  check_topk(params.topk, kMaxForwardTopk);
  check_block_size(params.block_size);
  if (params.total_q == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) {
    dispatch_head_dim(params.head_dim, [&](auto head_dim) {
      launch_forward_kernel<decltype(element), decltype(head_dim)::value>(params, order, stream);
    });
  });
}

}  // namespace msa::sm80
