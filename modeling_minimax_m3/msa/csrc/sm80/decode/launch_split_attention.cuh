// Definition of launch_split_attention, for the instantiation files.
#pragma once

#include "kernels.h"
#include "one_group_attention.cuh"
#include "split_attention.cuh"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
void launch_split_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  const AttentionPlan plan = plan_attention(params);
  const int q_heads_per_kv = params.num_heads / params.num_kv_heads;
  const dim3 grid(params.batch * params.num_new, params.num_kv_heads, plan.splits);
  const int64_t heads = int64_t{params.batch} * params.num_new * params.num_heads;
  const bool small = heads * plan.splits * (kHeadDim + 2) <= INT32_MAX;
  if (small && plan.splits > 1 && plan.groups_per_split == kAttentionWarps) {
    launch_dependent<one_group_attention_kernel<Element, kHeadDim>>(grid, kAttentionThreads, stream,
                                                                    params, q_heads_per_kv);
    return;
  }
  launch_dependent<split_attention_kernel<Element, kHeadDim>>(
      grid, kAttentionThreads, stream, params, plan.groups_per_split, q_heads_per_kv);
}

}  // namespace msa::sm80
