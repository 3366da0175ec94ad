#include "block_scores.h"

#include "smxx/common/dispatch.h"

namespace msa::sm90 {

void launch_block_scores(const SelectParams& params, const ScoreSchedule& schedule,
                         cudaStream_t stream) {
  dispatch(params.dtype, params.head_dim, [&](auto element, auto head_dim) {
    launch_block_scores<decltype(element), head_dim.value>(params, schedule, stream);
  });
}

}  // namespace msa::sm90
