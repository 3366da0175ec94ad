// Element types of operators that also take float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace msa {

enum class FloatDtype { kFloat16, kBFloat16, kFloat32 };

// Calls `function` with a value of the element type.
template <typename Function>
void dispatch_float_dtype(FloatDtype dtype, Function&& function) {
  if (dtype == FloatDtype::kFloat16) {
    function(__half{});
  } else if (dtype == FloatDtype::kBFloat16) {
    function(__nv_bfloat16{});
  } else {
    function(float{});
  }
}

}  // namespace msa
