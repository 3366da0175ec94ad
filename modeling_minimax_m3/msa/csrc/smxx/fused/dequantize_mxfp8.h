// MXFP8 values and scales as bfloat16.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace msa {

struct DequantizeMxfp8Params {
  const uint8_t* values;  // E4M3, contiguous, from a multiple of 16 bytes on
  const uint8_t* scales;  // one for 32 values
  void* out;              // bfloat16
  int64_t count;          // of values, a multiple of 32
};

void launch_dequantize_mxfp8(const DequantizeMxfp8Params& params, cudaStream_t stream);

}  // namespace msa
