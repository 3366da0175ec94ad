#include "query_major.h"

#include "smxx/common/dispatch.h"
#include "smxx/common/supported.h"

namespace msa::sm80 {

void launch_query_major(const ForwardParams& params, const TileOrder* order, cudaStream_t stream) {
  check_q_heads_per_kv(params.num_heads, params.num_kv_heads);
  check_topk(params.topk);
  check_block_size(params.block_size);
  if (params.total_q == 0) return;
  dispatch(params.dtype, params.head_dim, [&](auto element, auto head_dim) {
    launch_query_major<decltype(element), head_dim.value>(params, order, stream);
  });
}

}  // namespace msa::sm80
