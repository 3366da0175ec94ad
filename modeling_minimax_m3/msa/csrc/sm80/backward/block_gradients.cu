#include "block_gradients.h"

#include "smxx/backward/attention_backward.h"
#include "smxx/common/dispatch.h"

namespace msa::sm80 {

void launch_block_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            const BackwardSchedule* before, cudaStream_t stream) {
  if (before != nullptr) launch_query_gradients(params, *before, stream);
  dispatch(params.forward.dtype, params.forward.head_dim, [&](auto element, auto head_dim) {
    launch_block_gradients<decltype(element), head_dim.value>(params, schedule, stream);
  });
}

}  // namespace msa::sm80
