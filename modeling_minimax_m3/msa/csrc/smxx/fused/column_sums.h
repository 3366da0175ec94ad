// Second step of a deterministic sum: adds up what the thread blocks of the first step left.
#pragma once

#include <cuda_runtime_api.h>

#include "float_dtype.h"

namespace msa {

// Writes the sums of the columns of `partial_sums` (rows, width), in a fixed order, to `out`
// (width) of `dtype`. Asynchronous on `stream`. Throws std::runtime_error on a CUDA error.
void launch_column_sums(const float* partial_sums, int rows, int width, FloatDtype dtype, void* out,
                        cudaStream_t stream);

}  // namespace msa
