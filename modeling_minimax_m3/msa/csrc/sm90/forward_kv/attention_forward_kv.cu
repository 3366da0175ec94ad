#include "attention_forward_kv.h"

#include "../../common/dispatch.h"

namespace msa::sm90 {

void launch_partial_attention(const ForwardParams& params, const sm80::KvSchedule& schedule,
                              cudaStream_t stream) {
  dispatch_dtype(params.dtype, [&](auto element) {
    launch_partial_attention<decltype(element)>(params, schedule, stream);
  });
}

}  // namespace msa::sm90
