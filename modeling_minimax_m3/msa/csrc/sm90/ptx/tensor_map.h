// Host side of tensor copies: the description of a tensor and of its tiles.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "params.h"
#include "smxx/common/cuda_check.h"

namespace msa::sm90 {

// A tensor of 16-bit elements, fastest dimension first and contiguous, and the box that one copy
// takes from it. `base` is a multiple of 16 bytes, strides are in elements and multiples of 8. Rows
// of the box are 64 elements and lie in shared memory with the 128-byte swizzle.
template <int kDimensions>
struct TensorTiles {
  const void* base;
  uint64_t sizes[kDimensions];
  int64_t strides[kDimensions - 1];  // of dimensions 1, 2, ...
  uint32_t box[kDimensions];
};

template <int kDimensions>
CUtensorMap make_tensor_map(const TensorTiles<kDimensions>& tiles, Dtype dtype) {
  // Found at run time, so that the binary does not link against the driver.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    MSA_CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t sizes[kDimensions], strides[kDimensions - 1];
  cuuint32_t box[kDimensions], steps[kDimensions];
  for (int i = 0; i < kDimensions; ++i) {
    sizes[i] = tiles.sizes[i];
    box[i] = tiles.box[i];
    steps[i] = 1;
    // The stride of a dimension of one element means nothing, and may be anything.
    if (i > 0) strides[i - 1] = tiles.sizes[i] > 1 ? tiles.strides[i - 1] * 2 : 16;
  }
  CUtensorMap map;
  const CUresult status = encode(
      &map,
      dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      kDimensions, const_cast<void*>(tiles.base), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(status));
  }
  return map;
}

}  // namespace msa::sm90
