// The keys and values of a tile's block, to shared memory.
#pragma once

#include <cuda_runtime.h>

#include "buckets.cuh"
#include "smxx/common/async_copy.cuh"

namespace msa {

// All threads of the block copy; `offset_of(row, chunk)` is where 16 bytes of a row go. Rows past
// the end of the sequence become zeros. `block_size` is a reference, so that the loop reads a
// kernel's parameter itself.
template <typename Element, typename Config, typename Offset>
__device__ __forceinline__ void copy_block(const ForwardParams& params, const KvTile& tile,
                                           const int& block_size, uint32_t keys_address,
                                           uint32_t values_address, Offset offset_of) {
  constexpr int kRowChunks = Config::kHeadDim / 8;          // 16-byte chunks of a row
  constexpr int kCopyRows = Config::kThreads / kRowChunks;  // rows that all threads copy at once
  const int copy_row = threadIdx.x / kRowChunks;
  const int copy_chunk = threadIdx.x % kRowChunks;
  const Element* keys = static_cast<const Element*>(params.key) +
                        tile.sequence.key_begin * params.key_token_stride +
                        tile.kv_head * params.key_head_stride + copy_chunk * 8;
  const Element* values = static_cast<const Element*>(params.value) +
                          tile.sequence.key_begin * params.value_token_stride +
                          tile.kv_head * params.value_head_stride + copy_chunk * 8;
  for (int row = copy_row; row < block_size; row += kCopyRows) {
    const bool valid = tile.first_key + row < tile.sequence.len_k;
    const int64_t token = valid ? tile.first_key + row : 0;
    const uint32_t offset = offset_of(row, copy_chunk);
    copy_async_16(keys_address + offset, keys + token * params.key_token_stride, valid);
    copy_async_16(values_address + offset, values + token * params.value_token_stride, valid);
  }
  commit_copies();
}

}  // namespace msa
