#include "attention_forward.h"

#include "../../sm80/forward_order/attention_forward.h"
#include "../forward_kv/attention_forward_kv.h"
#include "../forward_q/attention_forward_q.h"

namespace msa::sm90 {

void launch_attention_forward(const ForwardParams& params, void* workspace, int64_t workspace_bytes,
                              cudaStream_t stream) {
  // A warpgroup's four tokens make one product of 64 rows, whether they chose the block or not;
  // README.md has the figures behind the share.
  constexpr sm80::OrderRule kRule = {4, 0.42f};
  if (takes_forward_q(params)) {
    sm80::launch_attention_forward(
        params,
        {kRule, launch_attention_forward_q,
         static_cast<sm80::PartialAttentionLauncher>(launch_partial_attention)},
        workspace, workspace_bytes, stream);
  } else {
    sm80::launch_attention_forward(params, workspace, workspace_bytes, stream);
  }
}

}  // namespace msa::sm90
