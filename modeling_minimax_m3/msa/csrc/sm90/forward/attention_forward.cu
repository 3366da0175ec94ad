#include "attention_forward.h"

#include <algorithm>

#include "../../sm80/forward/attention_forward.h"
#include "../../sm80/forward_kv/attention_forward_kv.h"
#include "../forward_kv/attention_forward_kv.h"
#include "../forward_kv/config.h"

namespace msa::sm90 {

namespace {

// KV-major, where it has a Hopper kernel, is far faster on selections that neighbours do not share
// and about as fast on others (README.md has the figures); but its launches have to pay, and so has
// loading a block's keys and values for the few queries of a part that chose it.
bool prefers_kv_major(const ForwardParams& params) {
  constexpr int kMinQueries = 2048;
  constexpr double kMinQueriesPerBlock = 2;
  if (params.head_dim != ForwardKvConfig::kHeadDim ||
      params.block_size != ForwardKvConfig::kBlockSize ||
      params.num_heads != params.num_kv_heads * sm80::kGroup || params.total_q < kMinQueries) {
    return false;
  }
  const double query_bytes = 2.0 * params.num_heads * params.topk * params.head_dim;
  const double part = std::min<double>(params.total_q, sm80::kPartialBytes / query_bytes);
  const double num_blocks = static_cast<double>(params.total_k) / params.block_size;
  return part * std::min<double>(params.topk, num_blocks) >= kMinQueriesPerBlock * num_blocks;
}

}  // namespace

int64_t attention_forward_workspace(const ForwardParams& params) {
  return prefers_kv_major(params) ? sm80::attention_forward_kv_workspace(params) : 0;
}

void launch_attention_forward(const ForwardParams& params, void* workspace, int64_t workspace_bytes,
                              cudaStream_t stream) {
  if (workspace_bytes > 0) {
    launch_attention_forward_kv(params, workspace, workspace_bytes, stream);
  } else {
    sm80::launch_attention_forward(params, stream);
  }
}

}  // namespace msa::sm90
