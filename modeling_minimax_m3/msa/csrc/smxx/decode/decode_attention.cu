// Attention for decoding: one kernel over the selected blocks, and one that combines its splits.
#include <stdexcept>
#include <string>

#include "combine_splits.cuh"
#include "config.h"
#include "decode.h"
#include "smxx/common/dispatch.h"

namespace msa {

namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("decode_attention: " + message);
}

void check(const DecodeAttentionParams& params) {
  require(params.block_size == 64 || params.block_size == 128,
          "block_size must be 64 or 128, got " + std::to_string(params.block_size));
  require(params.topk >= 1 && params.topk <= kMaxTopk,
          "topk must be 1 to 64, got " + std::to_string(params.topk));
  require(params.num_heads % params.num_kv_heads == 0 &&
              params.num_heads / params.num_kv_heads <= kMaxGroup,
          "at most 16 query heads per key/value head, got " + std::to_string(params.num_heads) +
              " and " + std::to_string(params.num_kv_heads));
  require(params.cache.block_table == nullptr || params.cache.page_size % kGroupKeys == 0,
          "page_size must be a multiple of 16, got " + std::to_string(params.cache.page_size));
  require(params.key_slot_stride <= kMaxSlotStride && params.value_slot_stride <= kMaxSlotStride,
          "slot stride of the keys or values too large");
  require(params.workspace_elements >= decode_attention_workspace(params), "workspace too small");
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
  const int group = params.num_heads / params.num_kv_heads;
  const dim3 grid(params.batch * params.num_new, params.num_kv_heads, 2 * group);
  dispatch(params.dtype, params.head_dim, [&](auto element, auto head_dim) {
    launch_dependent<combine_splits_kernel<decltype(element), head_dim.value>>(
        grid, kAttentionThreads, stream, params, splits, group);
  });
}

}  // namespace msa
