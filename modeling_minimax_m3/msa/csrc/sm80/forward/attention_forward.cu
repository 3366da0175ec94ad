#include "attention_forward.h"

#include <stdexcept>
#include <string>

#include "../../common/dispatch.h"
#include "config.h"

namespace msa::sm80 {

void launch_attention_forward_q(const ForwardParams& params, const TileOrder* order,
                                cudaStream_t stream) {
  if (params.num_kv_heads < 1 || params.num_heads % params.num_kv_heads != 0) {
    throw std::runtime_error("query heads must be a multiple of the key/value heads, got " +
                             std::to_string(params.num_heads) + " and " +
                             std::to_string(params.num_kv_heads));
  }
  const int group = params.num_heads / params.num_kv_heads;
  if (group < 1 || group > 16 || (group & (group - 1)) != 0) {
    throw std::runtime_error("query heads per key/value head must be 1, 2, 4, 8 or 16, got " +
                             std::to_string(group));
  }
  if (params.topk < 1 || params.topk > kMaxForwardTopk) {
    throw std::runtime_error("topk must be 1 to " + std::to_string(kMaxForwardTopk) + ", got " +
                             std::to_string(params.topk));
  }
  if (params.block_size != 64 && params.block_size != 128) {
    throw std::runtime_error("block_size must be 64 or 128, got " +
                             std::to_string(params.block_size));
  }
  if (params.total_q == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) {
    dispatch_head_dim(params.head_dim, [&](auto head_dim) {
      launch_forward_kernel<decltype(element), decltype(head_dim)::value>(params, order, stream);
    });
  });
}

}  // namespace msa::sm80
