// Barriers of a part of a thread block.
#pragma once

namespace msa::sm90 {

// Waits at barrier `number` until kThreads threads, whole warps, have come. Barrier 0 is that of
// __syncthreads.
template <int kThreads>
__device__ __forceinline__ void sync_threads(int number) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "n"(kThreads) : "memory");
}

// Waits for all threads of a warpgroup.
__device__ __forceinline__ void sync_warpgroup(int warpgroup) {
  sync_threads<128>(warpgroup + 1);
}

}  // namespace msa::sm90
