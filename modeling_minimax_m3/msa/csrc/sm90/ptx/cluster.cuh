// Thread blocks of a cluster: their shared memory, barriers and copies to all of them (sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace msa::sm90 {

// This thread block's number in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
                   : "memory");
}

// Arrives at the barrier that lies at this shared-memory address in thread block `rank`.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// As `copy_box`, to the same address in each thread block whose bit is set in `targets`. The bytes
// count on the barrier at that address in each of them.
__device__ __forceinline__ void copy_box_to(uint16_t targets, uint32_t target,
                                            const CUtensorMap& map, uint32_t barrier, int x, int y,
                                            int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(target),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(targets)
      : "memory");
}

}  // namespace msa::sm90
