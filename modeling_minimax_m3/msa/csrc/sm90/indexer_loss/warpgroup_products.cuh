// The products of smxx/indexer_loss/index_gradients.cuh with wgmma.
#pragma once

#include <cuda_runtime.h>

#include "config.h"
#include "sm90/ptx/wgmma.cuh"
#include "smxx/indexer_loss/index_gradients.cuh"

namespace msa::sm90 {

// Two warpgroups. Each sums the gradients of 64 keys, and computes those of all 64 queries for half
// of the channels.
template <typename Element>
class WarpgroupProducts {
 public:
  __device__ __forceinline__ static void publish_writes() { fence_async_proxy(); }

  template <typename Take>
  __device__ __forceinline__ static void scores(uint32_t queries, uint32_t keys,
                                                int /* block_size */, Take take) {
    const int warpgroup = threadIdx.x / 128;
    float sums[32];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < IndexerLossShape::kHeadDim / 16; ++step) {
      const int offset = step % 4 * 32;
      wgmma_m64n64k16<Element, false, false>(
          sums, swizzled_descriptor(queries + step / 4 * kPassPanelBytes + offset),
          swizzled_descriptor(keys + step / 4 * kKeyPanelBytes + warpgroup * 64 * 128 + offset),
          step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    accumulators_ready(sums);
    const int key = warpgroup * 64 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        take(half, own_row(half), key + i * 2,
             make_float2(sums[i + 2 * half], sums[i + 2 * half + 1]));
      }
    }
  }

  template <typename Store>
  __device__ __forceinline__ void pass(uint32_t gradients, uint32_t queries, uint32_t keys,
                                       int /* block_size */, Store store) {
    const int warpgroup = threadIdx.x / 128;
    float query_sums[32];
    wgmma_fence();
#pragma unroll
    for (int key = 0; key < IndexerLossShape::kBlockSize; key += 16) {
      wgmma_m64n64k16<Element, false, true>(
          query_sums, swizzled_descriptor(gradients + key / 64 * kPassPanelBytes + key % 64 * 2),
          transposed_descriptor(keys + warpgroup * kKeyPanelBytes + key * 128, kKeyPanelBytes),
          key > 0);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma_m64n64k16<Element, true, true>(
            key_sums_[half],
            transposed_descriptor(gradients + warpgroup * kPassPanelBytes + step * 2048,
                                  kPassPanelBytes),
            transposed_descriptor(queries + half * kPassPanelBytes + step * 2048, kPassPanelBytes),
            true);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    accumulators_ready(query_sums);
    accumulators_ready(key_sums_[0]);
    accumulators_ready(key_sums_[1]);
    give(query_sums, 0, warpgroup * 64, store);
  }

  template <typename Add>
  __device__ __forceinline__ void finish(Add add) const {
    const int warpgroup = threadIdx.x / 128;
    give(key_sums_[0], warpgroup * 64, 0, add);
    give(key_sums_[1], warpgroup * 64, 64, add);
  }

 private:
  static constexpr int kPassPanelBytes = 64 * 128;
  static constexpr int kKeyPanelBytes = IndexerLossShape::kBlockSize * 128;

  template <typename Take>
  __device__ __forceinline__ static void give(const float (&sums)[32], int row, int channel,
                                              Take take) {
    const int lane = threadIdx.x % 32;
    row += threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        take(row + half * 8, channel + i * 2 + lane % 4 * 2,
             make_float2(sums[i + 2 * half], sums[i + 2 * half + 1]));
      }
    }
  }

  float key_sums_[2][32] = {};  // of the two halves of the channels
};

}  // namespace msa::sm90
