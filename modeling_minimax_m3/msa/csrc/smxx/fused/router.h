// The routing of tokens to experts: sigmoid scores, the best of them, weights that sum to 1.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "float_dtype.h"

namespace msa {

constexpr int kMaxExperts = 512;
constexpr int kMaxExpertsPerToken = 16;

struct RouterParams {
  const void* logits;  // (tokens, num_experts), strided
  const void* bias;    // (num_experts), added to the scores to choose by, never to the weights
  float* weights;      // (tokens, top_k), contiguous output
  int64_t* indices;    // (tokens, top_k), contiguous output; best first, of equals the lowest id
  int64_t row_stride;  // of logits
  int tokens;
  int num_experts;
  int top_k;  // at most num_experts
  FloatDtype dtype;
  bool bias_is_float;  // float32; else of the dtype of the logits
};

struct RouterBackwardParams {
  const float* grad_weights;  // (tokens, top_k), contiguous
  const void* logits;         // (tokens, num_experts), strided
  const float* weights;       // (tokens, top_k), contiguous
  const int64_t* indices;     // (tokens, top_k), contiguous
  void* grad_logits;          // (tokens, num_experts), contiguous output
  int64_t row_stride;         // of logits
  int tokens;
  int num_experts;
  int top_k;
  FloatDtype dtype;
};

// Asynchronous on `stream`; they throw std::runtime_error on unsupported sizes or a CUDA error.
void launch_router(const RouterParams& params, cudaStream_t stream);
void launch_router_backward(const RouterBackwardParams& params, cudaStream_t stream);

}  // namespace msa
