// The cross-entropy of rows of logits, and its gradient in their place.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "float_dtype.h"

namespace msa {

// Largest width of a row; every width is a multiple of 8.
constexpr int64_t kMaxLogits = int64_t{1} << 30;

struct SoftmaxLossParams {
  void* logits;            // (rows, width), contiguous; overwritten with the gradient
  const int64_t* targets;  // (rows)
  const float* divisor;    // one number, of the gradient
  float* losses;           // (rows), output
  int rows;
  int width;
  FloatDtype dtype;  // of the logits
};

// At least one row. Asynchronous on `stream`; throws std::runtime_error on a CUDA error.
void launch_softmax_loss(const SoftmaxLossParams& params, cudaStream_t stream);

}  // namespace msa
