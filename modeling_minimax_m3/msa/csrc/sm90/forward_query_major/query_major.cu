#include "query_major.h"

#include "config.h"
#include "smxx/common/dispatch.h"
#include "smxx/common/supported.h"

namespace msa::sm90 {

bool supports_forward(const ForwardParams& params) {
  auto moves = [](int size, int64_t stride) { return size <= 1 || stride > 0; };
  return params.head_dim == QueryMajorConfig::kHeadDim &&
         params.block_size == QueryMajorConfig::kBlockSize &&
         params.num_heads == params.num_kv_heads * kQHeadsPerKv && params.topk >= 1 &&
         params.topk <= kMaxTopk && params.total_k <= kMaxUnionKeys && params.softmax_scale > 0 &&
         moves(params.total_q, params.query_token_stride) &&
         moves(params.num_heads, params.query_head_stride) &&
         moves(params.total_k, params.key_token_stride) &&
         moves(params.num_kv_heads, params.key_head_stride) &&
         moves(params.total_k, params.value_token_stride) &&
         moves(params.num_kv_heads, params.value_head_stride);
}

void launch_query_major(const ForwardParams& params, const TileOrder* order, cudaStream_t stream) {
  dispatch_dtype(params.dtype, [&](auto element) {
    launch_query_major<decltype(element)>(params, order, stream);
  });
}

}  // namespace msa::sm90
