// The element types that fused operators take, and the strides of their rows.
#pragma once

#include "smxx/fused/element_type.h"
#include "tensors.h"

namespace msa::api {

// The element type of a float16, bfloat16 or float32 tensor; any other is an error.
inline fused::ElementType element_type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return fused::ElementType::kFloat16;
    case ScalarType::BFloat16:
      return fused::ElementType::kBFloat16;
    case ScalarType::Float:
      return fused::ElementType::kFloat32;
    default:
      STD_TORCH_CHECK(false, "`", name, "` must be float16, bfloat16 or float32, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
      return {};
  }
}

}  // namespace msa::api
