#include "partial_attention.h"

#include "smxx/common/dispatch.h"

namespace msa::sm90 {

void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream) {
  dispatch_dtype(params.dtype, [&](auto element) {
    launch_partial_attention<decltype(element)>(params, schedule, stream);
  });
}

}  // namespace msa::sm90
