// RMS norm of rows, x / rms(x) * (1 + weight), also of a sum of two tensors, and its gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "float_dtype.h"

namespace msa {

// Largest width of a row; every width is a multiple of 8.
constexpr int kMaxNormWidth = 16384;

struct RmsNormParams {
  const void* x;         // (rows, width), rows strided
  const void* residual;  // (rows, width), rows strided, or null: what is added to x first
  const void* weight;    // (width), of the dtype or float32
  void* normed;          // (rows, width), contiguous output
  void* sum;             // (rows, width), contiguous output; null without a residual
  int rows;
  int width;
  int64_t x_stride;
  int64_t residual_stride;
  FloatDtype dtype;  // of all but the weight
  bool weight_is_float;
  float eps;
};

// The gradients, from the tensor that was normalized.
struct RmsNormGradientParams {
  const void* grad_normed;  // (rows, width), rows strided
  const void* grad_sum;     // (rows, width), rows strided, or null: what is added to the gradient
  const void* x;            // (rows, width), rows strided
  const void* weight;       // (width), of the dtype or float32
  void* grad_x;             // (rows, width), contiguous output, or null
  void* grad_weight;        // (width), contiguous output of the weight's dtype, or null
  float* partial_sums;      // (thread blocks, width), scratch; null without grad_weight
  int rows;
  int width;
  int64_t grad_normed_stride;
  int64_t grad_sum_stride;
  int64_t x_stride;
  FloatDtype dtype;
  bool weight_is_float;
  float eps;
};

// Both have at least one row. Asynchronous on `stream`; throw std::runtime_error on a CUDA error.
void launch_rms_norm(const RmsNormParams& params, cudaStream_t stream);
void launch_rms_norm_gradient(const RmsNormGradientParams& params, int thread_blocks,
                              cudaStream_t stream);

// The thread blocks of the launch above, on the current device with that many multiprocessors.
int rms_norm_gradient_thread_blocks(const RmsNormGradientParams& params, int num_sms);

}  // namespace msa
