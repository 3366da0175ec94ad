#include "column_sums.h"

#include <cstdint>

#include "smxx/common/dependent_launch.cuh"

namespace msa {

namespace {

constexpr int kColumns = 32;  // of a thread block: one a lane
constexpr int kWarps = 16;    // each takes every 16th row

template <typename Element>
__global__ void __launch_bounds__(32 * kWarps)
    column_sums_kernel(const float* partial_sums, int rows, int width, Element* out) {
  __shared__ float sums[kWarps][kColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = static_cast<int>(blockIdx.x) * kColumns + lane;
  wait_for_previous_kernel(partial_sums);

  float sum = 0.0f;
  if (column < width) {
#pragma unroll 4
    for (int row = warp; row < rows; row += kWarps) {
      sum += partial_sums[int64_t{row} * width + column];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < width) {
#pragma unroll
    for (int other = 1; other < kWarps; ++other) sum += sums[other][lane];
    out[column] = static_cast<Element>(sum);
  }
}

}  // namespace

void launch_column_sums(const float* partial_sums, int rows, int width, FloatDtype dtype, void* out,
                        cudaStream_t stream) {
  dispatch_float_dtype(dtype, [&](auto element) {
    using Element = decltype(element);
    launch_dependent<column_sums_kernel<Element>>(dim3((width + kColumns - 1) / kColumns),
                                                  32 * kWarps, stream, partial_sums, rows, width,
                                                  static_cast<Element*>(out));
  });
}

}  // namespace msa
