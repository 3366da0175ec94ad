// Copies by the copy engine from global to shared memory, reported to an mbarrier (TMA, sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace msa::sm90 {

// Copies the map's box at (channel, head, token) to `target`.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, uint32_t barrier,
                                         int channel, int head, int token) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];\n" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(channel), "r"(head), "r"(token)
      : "memory");
}

// Copies `bytes`, a multiple of 16; both addresses are multiples of 16.
__device__ __forceinline__ void copy_bulk(uint32_t target, const void* source, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];\n" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace msa::sm90
