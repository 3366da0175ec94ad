// The pairs of a token and one of its experts, sorted by expert.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace msa {

constexpr int kMaxOrderedExperts = 512;

struct ExpertOrderParams {
  const int64_t* expert_ids;  // (pairs), contiguous; others than 0 .. num_experts - 1 come last
  int32_t* rows;              // (pairs), output: the place of each pair among the sorted ones
  int32_t* offsets;           // (num_experts), output: where each expert's pairs end
  int32_t* workspace;         // expert_order_workspace(params) elements
  int num_pairs;
  int num_experts;
};

// Elements of the workspace for `num_pairs` and `num_experts`.
int64_t expert_order_workspace(const ExpertOrderParams& params);

// A stable sort: pairs of one expert keep their order. Asynchronous on `stream`; throws
// std::runtime_error on unsupported sizes or a CUDA error.
void launch_expert_order(const ExpertOrderParams& params, cudaStream_t stream);

}  // namespace msa
