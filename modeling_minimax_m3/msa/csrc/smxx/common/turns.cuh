// Thread blocks that add to the same sums one after the other, so that sums repeat bit for bit: a
// counter in global memory says whose turn it is.
//
// What is waited for must be running: thread blocks take their work in the order of the turns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace msa {

// Waits, in one thread, until the `turn` thread blocks before have passed. Then a barrier; what
// this thread's block reads of their sums must not come from L1. The first one does not wait.
__device__ __forceinline__ void await_turn(const int32_t* counter, int turn) {
  int32_t passed;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(passed) : "l"(counter) : "memory");
  } while (passed != turn);
}

// Lets the next one add, from one thread: after every thread of the block has written, fenced
// (__threadfence) and met at a barrier.
__device__ __forceinline__ void pass_turn(int32_t* counter, int turn) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;\n" ::"l"(counter), "r"(turn + 1) : "memory");
}

}  // namespace msa
