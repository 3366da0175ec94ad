#include "attention_forward_q.h"

#include "../../common/dispatch.h"
#include "config.h"

namespace msa::sm90 {

bool takes_forward_q(const ForwardParams& params) {
  auto moves = [](int size, int64_t stride) { return size <= 1 || stride > 0; };
  return params.head_dim == ForwardQConfig::kHeadDim &&
         params.block_size == ForwardQConfig::kBlockSize &&
         params.num_heads == params.num_kv_heads * sm80::kGroup && params.topk >= 1 &&
         params.topk <= 64 && params.total_k <= sm80::kMaxUnionKeys && params.softmax_scale > 0 &&
         moves(params.total_q, params.query_token_stride) &&
         moves(params.num_heads, params.query_head_stride) &&
         moves(params.total_k, params.key_token_stride) &&
         moves(params.num_kv_heads, params.key_head_stride) &&
         moves(params.total_k, params.value_token_stride) &&
         moves(params.num_kv_heads, params.value_head_stride);
}

void launch_attention_forward_q(const ForwardParams& params, const sm80::TileOrder* order,
                                cudaStream_t stream) {
  dispatch_dtype(params.dtype, [&](auto element) {
    launch_forward_q_kernel<decltype(element)>(params, order, stream);
  });
}

}  // namespace msa::sm90
