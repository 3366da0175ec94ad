#include "partial_attention.h"

#include "smxx/common/dispatch.h"

namespace msa::sm80 {

void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream) {
  dispatch(params.dtype, params.head_dim, [&](auto element, auto head_dim) {
    launch_partial_attention<decltype(element), head_dim.value>(params, schedule, stream);
  });
}

}  // namespace msa::sm80
