// Operands of the indexer's loss: keys in shared memory, queries in registers.
//
// A product does not mind in which order its channels come. Of every 32 channels, shared memory
// holds word w of 16-byte chunk c as word c of chunk w. The fragment of a lane, word lane % 4 of
// every chunk, then is chunk lane % 4 of the original row: queries go from global memory to
// fragments in loads of 16 bytes, with neither shared memory nor a barrier between.
#pragma once

#include <cuda_runtime.h>

#include "smxx/common/matrix.cuh"
#include "smxx/common/sequences.cuh"

namespace msa {

// Where a 16-byte chunk of a row lies: panels of 64 channels, one after the other, swizzled.
__device__ __forceinline__ int panel_offset(int row, int chunk, int rows) {
  return chunk / 8 * rows * 128 + swizzled_offset<8>(row, chunk % 8);
}

// All threads of the block store the keys of one key block, reordered; those past the sequence's
// end as zeros.
template <typename Element>
__device__ __forceinline__ void store_keys(unsigned char* target, const Element* keys,
                                           int64_t token_stride, int num_keys, int block_size,
                                           int channels) {
  const int row_chunks = channels / 8;
  for (int i = threadIdx.x; i < block_size * row_chunks; i += blockDim.x) {
    const int row = i / row_chunks;
    const int chunk = i % row_chunks;
    uint4 words = {};
    if (row < num_keys) {
      words = *reinterpret_cast<const uint4*>(keys + row * token_stride + chunk * 8);
    }
    auto store = [&](int place, uint32_t word) {
      *reinterpret_cast<uint32_t*>(target + panel_offset(row, chunk / 4 * 4 + place, block_size) +
                                   chunk % 4 * 4) = word;
    };
    store(0, words.x);
    store(1, words.y);
    store(2, words.z);
    store(3, words.w);
  }
}

// A lane's chunks of a row, one of every 32 channels; `chunks` is its chunk of the first 32. Zeros
// from `count` on.
template <int kGroups>
__device__ __forceinline__ void load_row(uint4 (&row)[kGroups], const void* chunks, int count) {
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    row[i] = i < count ? static_cast<const uint4*>(chunks)[i * 4] : uint4{};
  }
}

// Fragment `a` of 16 channels: rows lane / 4 and lane / 4 + 8.
template <int kGroups>
__device__ __forceinline__ void row_fragment(uint32_t (&a)[4], const uint4 (&low)[kGroups],
                                             const uint4 (&high)[kGroups], int step) {
  const uint4& first = low[step / 2];
  const uint4& second = high[step / 2];
  a[0] = step % 2 == 0 ? first.x : first.z;
  a[1] = step % 2 == 0 ? second.x : second.z;
  a[2] = step % 2 == 0 ? first.y : first.w;
  a[3] = step % 2 == 0 ? second.y : second.w;
}

}  // namespace msa
