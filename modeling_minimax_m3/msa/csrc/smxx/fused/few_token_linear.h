// Linear layers of a few tokens that read the same input.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "few_token_weights.h"
#include "params.h"

namespace msa {

constexpr int kMaxLinearWeights = 5;

struct FewTokenLinearParams {
  const void* x;                               // (num_tokens, channels), contiguous
  FewTokenWeights weights[kMaxLinearWeights];  // (rows, channels) each, all of one form
  int first_rows[kMaxLinearWeights];           // of each weight among all rows
  void* out;  // (num_tokens, rows of all weights), contiguous output
  int num_weights;
  int num_rows;    // of all weights
  int num_tokens;  // at most 16
  int channels;    // a multiple of 32, of 64 for MXFP8 weights
  Dtype dtype;
  bool
      weights_are_constant;  // no kernel before may have written them: they are read before its end
};

// Throws std::runtime_error for sizes that the kernel does not take.
void launch_few_token_linear(const FewTokenLinearParams& params, cudaStream_t stream);

}  // namespace msa
