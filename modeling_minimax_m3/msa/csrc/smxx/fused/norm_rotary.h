// RMS norm of each head, x / rms(x) * (1 + weight), then the rotary embedding of its first
// channels, and the gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "float_dtype.h"

namespace msa {

// Largest head dimension; every one is a multiple of 8, and half of the rotary channels too.
constexpr int kMaxNormRotaryDim = 256;

struct HeadStrides {
  int64_t batch;
  int64_t token;
  int64_t head;
};

struct NormRotaryParams {
  const void* states;  // (batch, tokens, heads, head_dim), strided
  const void* weight;  // (head_dim), of the dtype or float32
  const void* cos;     // (batch or 1, tokens, rotary_dim), contiguous, of the dtype or float32
  const void* sin;     // as cos
  void* out;           // (batch, tokens, heads, head_dim), contiguous output; not of the gradient
  HeadStrides strides;
  int batch;
  int tokens;
  int heads;
  int head_dim;
  int rotary_dim;
  int64_t angle_batch_stride;  // 0 where all rows of the batch share the angles
  FloatDtype dtype;
  bool weight_is_float;
  bool angles_are_float;
  float eps;
};

struct NormRotaryGradientParams {
  NormRotaryParams forward;
  const void* grad_out;  // (batch, tokens, heads, head_dim), strided
  void* grad_states;     // (batch, tokens, heads, head_dim), contiguous output, or null
  void* grad_weight;     // (head_dim), output of the weight's dtype, or null
  float* partial_sums;   // (thread blocks, head_dim), scratch; null without grad_weight
  HeadStrides grad_strides;
};

// Both have at least one token and head. Asynchronous on `stream`; throw std::runtime_error on a
// CUDA error.
void launch_norm_rotary(const NormRotaryParams& params, cudaStream_t stream);
void launch_norm_rotary_gradient(const NormRotaryGradientParams& params, int thread_blocks,
                                 cudaStream_t stream);

// The thread blocks of the launch above, on the current device with that many multiprocessors.
int norm_rotary_gradient_thread_blocks(const NormRotaryGradientParams& params, int num_sms);

}  // namespace msa
