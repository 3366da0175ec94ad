// Run-time values as template arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace msa {

// Calls `function` with a value of the element type.
template <typename Function>
void dispatch_dtype(Dtype dtype, Function&& function) {
  if (dtype == Dtype::kFloat16) {
    function(__half{});
  } else {
    function(__nv_bfloat16{});
  }
}

// Calls `function` with std::integral_constant<int, head_dim>.
template <typename Function>
void dispatch_head_dim(int head_dim, Function&& function) {
  if (head_dim == 64) {
    function(std::integral_constant<int, 64>{});
  } else if (head_dim == 128) {
    function(std::integral_constant<int, 128>{});
  } else {
    throw std::runtime_error("head_dim must be 64 or 128, got " + std::to_string(head_dim));
  }
}

// Calls `function` with both.
template <typename Function>
void dispatch(Dtype dtype, int head_dim, Function&& function) {
  dispatch_dtype(dtype, [&](auto element) {
    dispatch_head_dim(head_dim, [&](auto size) { function(element, size); });
  });
}

}  // namespace msa
