#include "attention_forward.h"

#include "smxx/forward_kv_major/config.h"
#include "smxx/forward_query_major/tile_union.cuh"

namespace msa {

namespace {

// KV-major launches have to pay, and so has loading a block's keys and values for the few queries
// of a part that chose it.
bool may_go_kv_major(const ForwardParams& params) {
  constexpr int kMinQueries = 2048;
  constexpr int64_t kMinQueriesPerBlock = 2;
  if (params.num_heads != params.num_kv_heads * kQHeadsPerKv || params.total_q < kMinQueries ||
      params.total_k > kMaxUnionKeys) {
    return false;
  }
  const int64_t num_blocks = params.total_k / params.block_size + 1;
  return forward_kv_part_tokens(params) * std::min<int64_t>(params.topk, num_blocks) >=
         kMinQueriesPerBlock * num_blocks;
}

}  // namespace

int64_t attention_forward_workspace(const ForwardParams& params) {
  if (!may_go_kv_major(params)) return 0;
  return attention_forward_kv_workspace(params) +
         tile_order_workspace(params, forward_kv_part_tokens(params));
}

void launch_attention_forward(const ForwardParams& params, const ForwardKernels& kernels,
                              void* workspace, int64_t workspace_bytes, cudaStream_t stream) {
  if (workspace_bytes == 0) {
    kernels.query_major(params, nullptr, stream);
    return;
  }
  const int64_t part_tokens = forward_kv_part_tokens(params);
  const int64_t order_bytes = tile_order_workspace(params, part_tokens);
  const TileOrder order = launch_choose_order(params, kernels.rule, workspace, part_tokens, stream);
  kernels.query_major(params, &order, stream);
  launch_forward_kv(params, &order, static_cast<unsigned char*>(workspace) + order_bytes,
                    workspace_bytes - order_bytes, kernels.kv_major, stream);
}

}  // namespace msa
