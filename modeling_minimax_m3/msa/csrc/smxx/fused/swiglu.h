// The gated activation of the MLPs: (up + 1) * gate * sigmoid(alpha * gate), both halves clamped.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "float_dtype.h"

namespace msa {

struct SwigluParams {
  const void* gate_up;   // (rows, 2 * width), strided; the gate half first
  const void* grad_out;  // (rows, width), contiguous; null in the forward
  void* out;             // (rows, width), of the backward (rows, 2 * width); contiguous output
  int64_t row_stride;    // of gate_up
  int rows;
  int width;  // a multiple of 8
  float alpha;
  float limit;
  FloatDtype dtype;
};

// Both write params.out. Asynchronous on `stream`; they throw std::runtime_error on a CUDA error.
void launch_swiglu(const SwigluParams& params, cudaStream_t stream);
void launch_swiglu_backward(const SwigluParams& params, cudaStream_t stream);

}  // namespace msa
