// What the fused operators share: dtypes with float32, and tensors as rows.
#pragma once

#include "smxx/fused/float_dtype.h"
#include "tensors.h"

namespace msa::api {

// The kernels' dtype of a float16, bfloat16 or float32 tensor; any other is an error.
inline FloatDtype float_dtype_of(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Half) return FloatDtype::kFloat16;
  if (dtype == ScalarType::BFloat16) return FloatDtype::kBFloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Float, "`", name,
                  "` must be float16, bfloat16 or float32, got ",
                  torch::headeronly::toString(dtype));
  return FloatDtype::kFloat32;
}

// Whether a tensor is float32; any dtype but that and `dtype` is an error.
inline bool is_float_beside(const char* name, const Tensor& tensor, FloatDtype dtype) {
  const FloatDtype own = float_dtype_of(name, tensor);
  STD_TORCH_CHECK(own == dtype || own == FloatDtype::kFloat32, "`", name,
                  "` must be float32 or of the dtype of the states, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  return own == FloatDtype::kFloat32;
}

// The address of a contiguous tensor that kernels read 16 bytes at a time.
inline const void* contiguous_data(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "`", name, "` must be contiguous");
  return vector_data(name, tensor);
}

}  // namespace msa::api
