// The list of one query block for one key/value head, worked out by a warp.
//
// `reference.structured_block_list` is the definition; every integer here is one of its integers.
#pragma once

#include <cstdint>

#include "params.h"

namespace msa::structured {

constexpr unsigned kWholeWarp = 0xffffffff;

// First word of Philox-4x32-10.
__device__ __forceinline__ uint32_t philox_first_word(uint32_t word0, uint32_t word1,
                                                      uint32_t word2, uint32_t word3, uint32_t key0,
                                                      uint32_t key1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kKeyStep0 = 0x9E3779B9, kKeyStep1 = 0xBB67AE85;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(kMultiplier0, word0), low0 = kMultiplier0 * word0;
    const uint32_t high1 = __umulhi(kMultiplier1, word2), low1 = kMultiplier1 * word2;
    word0 = high1 ^ word1 ^ key0;
    word1 = low1;
    word2 = high0 ^ word3 ^ key1;
    word3 = low0;
    key0 += kKeyStep0;
    key1 += kKeyStep1;
  }
  return word0;
}

// Writes the ascending list of a query in `block` to list[0 .. width). Lane l works on the places
// l, l + 32, ... of which kPlaces cover the width.
template <int kPlaces>
__device__ __forceinline__ void write_block_list(const StructuredParams& params, int block,
                                                 int head, int* list) {
  const int lane = threadIdx.x % 32, width = params.width, local = params.local_blocks;
  if (block < width) {  // every visible block; none for a negative one
    for (int i = lane; i < width; i += 32) list[i] = i <= block ? i : -1;
    return;
  }
  // Anchors below the local window, then the window: ascending, and none twice.
  int64_t stride = params.anchor_stride;
  int num_anchors = 0;
  if (params.anchor_blocks > 0) {
    while (stride * params.anchor_blocks <= block) stride *= 2;
    num_anchors = static_cast<int>((block - local) / stride) + 1;
  }
  const int num_fixed = num_anchors + local, num_drawn = width - num_fixed;
  const auto fixed_block = [&](int i) {
    return i < num_anchors ? static_cast<int>(i * stride) : block - local + 1 + i - num_anchors;
  };

  // Floyd's sampling: a draw that was taken before becomes the largest number of its range.
  int drawn[kPlaces];
#pragma unroll
  for (int p = 0; p < kPlaces; ++p) {
    const int draw = lane + 32 * p;
    const uint32_t word =
        philox_first_word(params.layer, head, block, draw, params.seed_low, params.seed_high);
    drawn[p] = static_cast<int>(__umulhi(word, block - width + draw + 2));
  }
#pragma unroll
  for (int p = 0; p < kPlaces; ++p) {
    for (int source = 0; source < 32 && source + 32 * p < num_drawn; ++source) {
      const int draw = source + 32 * p;
      const int number = __shfl_sync(kWholeWarp, drawn[p], source);
      bool is_same = false;
#pragma unroll
      for (int q = 0; q <= p; ++q) is_same |= lane + 32 * q < draw && drawn[q] == number;
      if (__any_sync(kWholeWarp, is_same) && lane == source) drawn[p] = block - width + draw + 1;
    }
  }

  // The r-th block that is not fixed: step over each fixed one that is not above it.
  int place[kPlaces];  // of the drawn block in the list: the blocks below it, fixed and drawn
#pragma unroll
  for (int p = 0; p < kPlaces; ++p) {
    const int rank = drawn[p];
    for (int i = 0; i < num_fixed; ++i) drawn[p] += drawn[p] >= fixed_block(i);
    place[p] = drawn[p] - rank;
  }
  int fixed[kPlaces], fixed_place[kPlaces];
#pragma unroll
  for (int p = 0; p < kPlaces; ++p) {
    fixed_place[p] = lane + 32 * p;
    fixed[p] = fixed_block(fixed_place[p]);
  }
#pragma unroll
  for (int p = 0; p < kPlaces; ++p) {
    for (int source = 0; source < 32 && source + 32 * p < num_drawn; ++source) {
      const int other = __shfl_sync(kWholeWarp, drawn[p], source);
#pragma unroll
      for (int q = 0; q < kPlaces; ++q) {
        place[q] += other < drawn[q];
        fixed_place[q] += other < fixed[q];
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kPlaces; ++p) {
    if (lane + 32 * p < num_drawn) list[place[p]] = drawn[p];
    if (lane + 32 * p < num_fixed) list[fixed_place[p]] = fixed[p];
  }
}

}  // namespace msa::structured
