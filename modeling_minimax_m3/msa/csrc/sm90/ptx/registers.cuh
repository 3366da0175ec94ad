// Registers moved from one warpgroup to another (setmaxnreg, sm_90a).
#pragma once

namespace msa::sm90 {

// By all warps of a warpgroup; kCount is a multiple of 8.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

}  // namespace msa::sm90
