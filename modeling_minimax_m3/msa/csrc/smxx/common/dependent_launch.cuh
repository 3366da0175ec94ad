// Kernel launches that hide behind the kernel before them.
//
// On Hopper and later, code compiled for sm_90 may be launched while the previous kernel of the
// stream still runs (programmatic dependent launch): it is resident when that kernel ends, which
// saves most of the gap between two short kernels. Elsewhere these are ordinary launches.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "cuda_check.h"

namespace msa {

// The kernel launched next may start when all thread blocks have come here.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until the kernels before are done. One that never waits counts as done before they are.
__device__ __forceinline__ void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Executed by every thread before any global access, also by CTAs without work: a kernel counts as
// finished only after the ones before it. The next kernel may take its place from then on, and
// waits in turn; let in earlier, it made short steps slower (see README.md).
// `addresses` are what the kernel reads first, none of them null: the wait depends on them, because
// the compiler would otherwise compute them after it, where the time counts.
template <typename... Pointers>
__device__ __forceinline__ void wait_for_previous_kernel(const Pointers*... addresses) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint64_t any = (reinterpret_cast<uint64_t>(addresses) | ...);
  asm volatile(
      "{\n"
      "  .reg .pred not_null;\n"
      "  setp.ne.u64 not_null, %0, 0;\n"
      "  @not_null griddepcontrol.wait;\n"
      "}\n" ::"l"(any)
      : "memory");
#endif
  let_next_kernel_start();
}

// An ordinary launch, or one that may start early: `kernel` waits by itself.
template <typename... Parameters, typename... Arguments>
void launch_beside(void (*kernel)(Parameters...), bool starts_early, dim3 grid, int threads,
                   int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = starts_early ? 1 : 0;
  MSA_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Whether the code of `kKernel` that the current device runs holds the wait above: without it an
// early launch would be a race. Asked once per kernel and device.
template <auto kKernel>
bool supports_early_launch() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> answers[kMaxDevices];  // 0: not asked yet, 1: no, 2: yes
  int device = 0;
  MSA_CHECK_CUDA(cudaGetDevice(&device));
  if (device >= kMaxDevices) return false;
  int answer = answers[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes attributes{};
    MSA_CHECK_CUDA(cudaFuncGetAttributes(&attributes, kKernel));
    answer = attributes.ptxVersion >= 90 ? 2 : 1;
    answers[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

template <auto kKernel, typename... Arguments>
void launch_dependent(dim3 grid, int threads, cudaStream_t stream, const Arguments&... arguments) {
  launch_beside(kKernel, supports_early_launch<kKernel>(), grid, threads, 0, stream, arguments...);
}

}  // namespace msa
