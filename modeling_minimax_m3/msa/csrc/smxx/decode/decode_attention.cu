// Attention for decoding: one kernel over the selected blocks, and one that combines its splits.
#include <string>

#include "check.h"
#include "combine_splits.cuh"
#include "config.h"
#include "decode.h"
#include "smxx/common/dispatch.h"

namespace msa {

namespace {

void check(const DecodeAttentionParams& params) {
  const CallCheck call("decode_attention");
  call.check_sizes(params.block_size, params.topk, params.cache);
  call.require(params.num_heads % params.num_kv_heads == 0 &&
                   params.num_heads / params.num_kv_heads <= kMaxQHeadsPerKv,
               "at most 16 query heads per key/value head, got " +
                   std::to_string(params.num_heads) + " and " +
                   std::to_string(params.num_kv_heads));
  call.require(
      params.key_slot_stride <= kMaxSlotStride && params.value_slot_stride <= kMaxSlotStride,
      "slot stride of the keys or values too large");
  call.require(params.workspace_elements >= decode_attention_workspace(params),
               "workspace too small");
}

}  // namespace

int64_t decode_attention_workspace(const DecodeAttentionParams& params) {
  const int splits = plan_attention(params).splits;
  if (splits == 1) return 0;
  return int64_t{params.batch} * params.num_new * params.num_heads * splits * (params.head_dim + 2);
}

void launch_decode_attention(const DecodeAttentionParams& params,
                             SplitAttentionLauncher launch_split_attention, cudaStream_t stream) {
  check(params);
  if (int64_t{params.batch} * params.num_new * params.num_heads == 0) return;
  launch_split_attention(params, stream);
  const int splits = plan_attention(params).splits;
  if (splits == 1) return;
  const int q_heads_per_kv = params.num_heads / params.num_kv_heads;
  const dim3 grid(params.batch * params.num_new, params.num_kv_heads, 2 * q_heads_per_kv);
  dispatch(params.dtype, params.head_dim, [&](auto element, auto head_dim) {
    launch_dependent<combine_splits_kernel<decltype(element), head_dim.value>>(
        grid, kAttentionThreads, stream, params, splits, q_heads_per_kv);
  });
}

}  // namespace msa
