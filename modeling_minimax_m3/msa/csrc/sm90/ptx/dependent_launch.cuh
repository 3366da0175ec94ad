// A kernel that starts while the one before it in the stream still runs (programmatic dependent
// launch).
#pragma once

#include <cuda_runtime.h>

#include "smxx/common/cuda_check.h"

namespace msa::sm90 {

// The kernel launched next may start when all thread blocks have come here.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

// Until the kernels before are done. One that never waits counts as done before they are.
__device__ __forceinline__ void wait_for_kernels_before() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}

template <typename... Parameters, typename... Arguments>
void launch_beside(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  MSA_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace msa::sm90
