// Element types of the fused operators: the half precisions, and float32, which attention lacks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace msa::fused {

enum class ElementType { kFloat16, kBFloat16, kFloat32 };

constexpr int element_bytes(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : 2;
}

// Calls `function` with a value of the element type.
template <typename Function>
void dispatch_element_type(ElementType type, Function&& function) {
  switch (type) {
    case ElementType::kFloat16:
      return function(__half{});
    case ElementType::kBFloat16:
      return function(__nv_bfloat16{});
    case ElementType::kFloat32:
      return function(float{});
  }
}

}  // namespace msa::fused
