// The products of attention with wgmma, and the scores between them: what both loop orders share.
//
// A warpgroup has 64 query rows and one block of 128 keys, so that a lane holds 64 scores: of rows
// lane / 4 and lane / 4 + 8 of its warp. All rows of a warp belong to one token.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "ptx/wgmma.cuh"
#include "smxx/common/quads.cuh"

namespace msa::sm90 {

// Starts queries times keys; both lie as panels of 64 channels.
template <typename Element, typename Config>
__device__ __forceinline__ void start_scores(float (&scores)[64], uint32_t queries_address,
                                             uint32_t keys_address) {
#pragma unroll
  for (int step = 0; step < Config::kHeadDim / 16; ++step) {
    const uint32_t offset = step % 4 * 32;
    wgmma_m64n128k16<Element>(
        scores, swizzled_descriptor(queries_address + step / 4 * Config::kQueryPanelBytes + offset),
        swizzled_descriptor(keys_address + step / 4 * Config::kKeyPanelBytes + offset), step > 0);
  }
  wgmma_commit();
}

// Starts weights times values, added to `out` where `accumulates`.
template <typename Element, typename Config, bool kAccumulates>
__device__ __forceinline__ void start_outputs(float (&out)[64], const uint32_t (&weights)[8][4],
                                              uint32_t values_address) {
#pragma unroll
  for (int step = 0; step < Config::kBlockSize / 16; ++step) {
    wgmma_m64n128k16<Element, true>(
        out, weights[step],
        transposed_descriptor(values_address + step * 2048, Config::kKeyPanelBytes),
        kAccumulates || step > 0);
  }
  wgmma_commit();
}

// Keys after the last one that the token sees take no part.
template <typename Config>
__device__ __forceinline__ void mask_scores(float (&scores)[64], int last_key) {
  if (last_key >= Config::kBlockSize - 1) return;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (i / 4 * 8 + lane % 4 * 2 + i % 2 > last_key) scores[i] = -INFINITY;
  }
}

// The largest score of row lane / 4 (+ 8 in the second half), and of `start`.
__device__ __forceinline__ float largest_of_row(const float (&scores)[64], int half, float start) {
  float value = start;
#pragma unroll
  for (int i = 2 * half; i < 64; i += 4) value = fmaxf(value, fmaxf(scores[i], scores[i + 1]));
  return quad_max(value);
}

}  // namespace msa::sm90
