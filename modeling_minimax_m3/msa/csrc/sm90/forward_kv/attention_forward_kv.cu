#include "attention_forward_kv.h"

#include "../../common/dispatch.h"
#include "../../sm80/forward_kv/attention_forward_kv.h"
#include "config.h"

namespace msa::sm90 {

void launch_attention_forward_kv(const ForwardParams& params, void* workspace,
                                 int64_t workspace_bytes, cudaStream_t stream) {
  auto launch_partial = [](const ForwardParams& params, const sm80::KvSchedule& schedule,
                           cudaStream_t stream) {
    if (params.head_dim != ForwardKvConfig::kHeadDim ||
        params.block_size != ForwardKvConfig::kBlockSize) {
      sm80::launch_partial_attention(params, schedule, stream);
      return;
    }
    dispatch_dtype(params.dtype, [&](auto element) {
      launch_partial_attention<decltype(element)>(params, schedule, stream);
    });
  };
  sm80::launch_forward_kv(params, workspace, workspace_bytes, launch_partial, stream);
}

}  // namespace msa::sm90
