#include "combine_index_query.cuh"

#include "indexer_loss.h"
#include "smxx/common/cuda_check.h"
#include "smxx/common/dispatch.h"

namespace msa {

void launch_combine_index_query(const IndexerLossParams& params,
                                const IndexerLossSchedule& schedule, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(schedule.lists.token_end - schedule.lists.token_begin) *
                       params.attention.num_kv_heads;
  const auto grid = static_cast<unsigned>((rows + kCombineRowWarps - 1) / kCombineRowWarps);
  dispatch(params.attention.dtype, params.index_dim, [&](auto element, auto index_dim) {
    combine_index_query_kernel<decltype(element), index_dim.value>
        <<<grid, 32 * kCombineRowWarps, 0, stream>>>(params, schedule);
  });
  MSA_CHECK_LAUNCH();
}

}  // namespace msa
