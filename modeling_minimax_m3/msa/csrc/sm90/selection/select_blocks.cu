#include "select_blocks.h"

#include "../../common/dispatch.h"
#include "config.h"

namespace msa::sm90 {

void launch_select_blocks(const SelectParams& params, cudaStream_t stream) {
  auto launch_scores = [](const SelectParams& params, const sm80::ScoreSchedule& schedule,
                          cudaStream_t stream) {
    dispatch_dtype(params.dtype, [&](auto element) {
      dispatch_head_dim(params.head_dim, [&](auto head_dim) {
        launch_block_scores<decltype(element), decltype(head_dim)::value>(params, schedule, stream);
      });
    });
  };
  sm80::launch_selection(params, launch_scores, kMaxBlocksPerUnit, kWantedUnits, stream);
}

}  // namespace msa::sm90
