// Copies from global to shared memory by the copy engine, reported to an mbarrier (TMA, sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace msa::sm90 {

// Copies the map's box at these coordinates (fastest dimension first) to shared memory and counts
// its bytes on `barrier`; what lies outside the tensor becomes zeros. One thread calls it.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, uint32_t barrier,
                                         int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(target),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, uint32_t barrier,
                                         int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(target),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}

// Brings the map itself near, so that the first copy does not wait for it.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// Copies `bytes`, a multiple of 16; both addresses are multiples of 16. One thread calls it.
__device__ __forceinline__ void copy_bulk(uint32_t target, const void* source, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];\n" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace msa::sm90
