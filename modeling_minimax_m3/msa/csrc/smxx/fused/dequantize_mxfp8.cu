#include "dequantize_mxfp8.h"

#include "few_token_weights.h"
#include "mxfp8_numbers.cuh"
#include "smxx/common/launch.h"

namespace msa {

namespace {

// A warp writes 512 adjacent bytes by each store: the 8 numbers of a load take 16 bytes.
constexpr int kThreads = 256;
constexpr int kValues = 8;  // of a load
constexpr int kLoads = 8;   // of a thread
constexpr int kBlock = kThreads * kValues * kLoads;

__global__ void __launch_bounds__(kThreads)
    dequantize_mxfp8_kernel(const DequantizeMxfp8Params params) {
  const int64_t first = int64_t{blockIdx.x} * kBlock + threadIdx.x * kValues;
  uint2 values[kLoads];
  uint32_t scales[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t place = first + i * kThreads * kValues;
    if (place < params.count) {
      values[i] = __ldcs(reinterpret_cast<const uint2*>(params.values + place));
      scales[i] = __ldg(params.scales + place / kMxfp8Group);
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t place = first + i * kThreads * kValues;
    if (place < params.count) {
      static_cast<uint4*>(params.out)[place / 8] =
          any_mxfp8_numbers(values[i].x, values[i].y, scales[i]);
    }
  }
}

}  // namespace

void launch_dequantize_mxfp8(const DequantizeMxfp8Params& params, cudaStream_t stream) {
  if (params.count == 0) return;
  const auto blocks = static_cast<unsigned>((params.count + kBlock - 1) / kBlock);
  launch_kernel(dequantize_mxfp8_kernel, dim3(blocks), kThreads, 0, stream, params);
}

}  // namespace msa
