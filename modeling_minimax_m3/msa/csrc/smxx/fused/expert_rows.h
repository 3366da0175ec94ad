// Rows of tokens, one for each of a token's experts: their copies, weighted sums and gradients.
//
// Rows are sorted by expert. Those from offsets[num_experts - 1] on belong to no expert: they are
// neither read nor written, and count as zero.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "float_dtype.h"

namespace msa {

constexpr int kMaxRowsOfToken = 16;

// What the three operators share.
struct ExpertRows {
  const int32_t* rows;      // (tokens, top_k), contiguous: the row of each pair
  const int32_t* num_rows;  // one element: the rows that belong to an expert
  int tokens;
  int top_k;
  int width;  // a multiple of 8
  FloatDtype dtype;
};

struct GatherTokensParams {
  ExpertRows order;
  const void* x;       // (tokens, width), strided
  void* out;           // (tokens * top_k, width), contiguous output
  int64_t row_stride;  // of x
};

// out = base + scale * (sum over the token's rows, each times its weight)
struct SumExpertRowsParams {
  ExpertRows order;
  const void* expert_rows;  // (tokens * top_k, width), contiguous
  const float* weights;     // (tokens, top_k), contiguous; null for ones
  const void* base;         // (tokens, width), contiguous; null for zeros
  void* out;                // (tokens, width), contiguous output
  float scale;
};

struct SumExpertRowsBackwardParams {
  ExpertRows order;
  const void* grad_out;     // (tokens, width), contiguous
  const void* expert_rows;  // (tokens * top_k, width), contiguous; null without grad_weights
  const float* weights;     // (tokens, top_k), contiguous
  void* grad_rows;          // (tokens * top_k, width), contiguous output or null
  float* grad_weights;      // (tokens, top_k), contiguous output or null
  float scale;
};

// Asynchronous on `stream`; they throw std::runtime_error on unsupported sizes or a CUDA error.
void launch_gather_tokens(const GatherTokensParams& params, cudaStream_t stream);
void launch_sum_expert_rows(const SumExpertRowsParams& params, cudaStream_t stream);
void launch_sum_expert_rows_backward(const SumExpertRowsBackwardParams& params,
                                     cudaStream_t stream);

}  // namespace msa
