// The current device.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda_check.h"

namespace msa {

inline int num_multiprocessors() {
  int device = 0, count = 0;
  MSA_CHECK_CUDA(cudaGetDevice(&device));
  MSA_CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace msa
