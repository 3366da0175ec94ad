// Where the shares of an item leave their results for the kernel that combines them.
#pragma once

#include <cstdint>

#include "params.h"

namespace msa {

// Partial results in the workspace: unnormalised outputs of head_dim columns, then (maximum, sum)
// pairs, the maximum in units of log2; one each per item, head and split.
struct PartialResults {
  float* outputs;
  float2* softmax;
};

__host__ __device__ __forceinline__ PartialResults
partial_results(const DecodeAttentionParams& params, int splits) {
  const int64_t heads = int64_t{params.batch} * params.num_new * params.num_heads * splits;
  return {params.workspace, reinterpret_cast<float2*>(params.workspace + heads * params.head_dim)};
}

__device__ __forceinline__ int64_t partial_index(int64_t item, int split, int head, int splits,
                                                 int q_heads_per_kv) {
  return (item * q_heads_per_kv + head) * splits + split;
}

}  // namespace msa
