// Descriptions of strided operands for the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../../common/cuda_check.h"
#include "../../params.h"

namespace msa::sm90 {

// A (tokens, heads, channels) operand, copied in boxes of one token x `box_heads` heads x 64
// channels whose rows are swizzled by 128 bytes. `base` is a multiple of 16 bytes, the strides are
// positive multiples of 8 elements.
inline CUtensorMap make_tensor_map(const void* base, Dtype dtype, int tokens, int heads,
                                   int channels, int64_t token_stride, int64_t head_stride,
                                   int box_heads) {
  // The driver is not linked with: its functions are looked up where it runs.
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  MSA_CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                  cudaEnableDefault, &result));
  if (result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(tokens)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(head_stride) * 2,
                                static_cast<cuuint64_t>(token_stride) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_heads), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map,
      dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      3, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  }
  return map;
}

}  // namespace msa::sm90
