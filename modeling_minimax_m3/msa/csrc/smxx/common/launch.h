// One launch of a kernel with dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <mutex>

#include "cuda_check.h"

namespace msa {

inline std::mutex& launch_mutex() {
  static std::mutex mutex;
  return mutex;
}

// Lets the kernel take `shared_bytes`, more than the 48 KB that need no permission, and launches
// it. Throws std::runtime_error when CUDA refuses.
template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  // Threads share the permission: another one must not lower it before this launch.
  const std::lock_guard<std::mutex> lock(launch_mutex());
  MSA_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  MSA_CHECK_LAUNCH();
}

}  // namespace msa
