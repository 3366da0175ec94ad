// The blocks that a tile of eight query tokens chose, each with the tokens that chose it; the work
// of one warp.
//
// Entries are (sequence, block, token), sorted, which brings the tokens of a block together
// whatever order, gaps or repetitions the ids come in. Ids that name no visible block are dropped
// here and never become an address.
#pragma once

#include <cstdint>

#include "params.h"
#include "smxx/common/bitonic_sort.cuh"
#include "smxx/common/sequences.cuh"

namespace msa {

constexpr int kTileTokens = 8;
constexpr int kMaxUnionKeys = 1 << 30;  // 2^24 blocks of 64

// The tokens of a tile within their sequences.
struct TileTokens {
  int position[kTileTokens];   // among the sequence's keys; negative: sees none
  int key_begin[kTileTokens];  // packed first key of the sequence
  int len_k[kTileTokens];
};

// One block of the union: the block of a sequence, and a bit for each token that chose it.
__device__ __forceinline__ int union_block(uint32_t entry) {
  return entry >> kTileTokens;
}
__device__ __forceinline__ uint32_t union_tokens(uint32_t entry) {
  return entry & ((1u << kTileTokens) - 1);
}

// Fills `tokens` and `entries` (shared memory, room for `entry_count` entries: a power of two, at
// least kTileTokens * topk) and returns the number of blocks. They come in ascending order,
// sequence after sequence. All lanes of a warp take part; ends with a barrier of the warp.
__device__ __forceinline__ int build_tile_union(const ForwardParams& params, int tile, int kv_head,
                                                TileTokens& tokens, uint32_t* entries,
                                                int entry_count, int lane) {
  constexpr uint32_t kNone = 0xffffffffu;
  constexpr int kBlockBits = 24,
                kTokenBits = 3;  // entries: first token of the sequence, block, token
  const int tile_begin = tile * kTileTokens;
  int position = -1, sequence_token = 0;
  if (lane < kTileTokens) {
    Sequence sequence = {};
    const int token = tile_begin + lane;
    const int index = token < params.total_q
                          ? find_sequence(params.cu_seqlens_q, params.batch, token)
                          : params.batch;
    if (index < params.batch) {
      sequence = load_sequence(params.cu_seqlens_q, params.cu_seqlens_k, index, params.total_q,
                               params.total_k);
      position = sequence.first_position + token - sequence.query_begin;
      sequence_token = max(sequence.query_begin - tile_begin, 0);
    }
    tokens.position[lane] = position;
    tokens.key_begin[lane] = sequence.key_begin;
    tokens.len_k[lane] = sequence.len_k;
  }
  for (int base = 0; base < entry_count; base += 32) {
    const int i = base + lane;
    const int token = i / params.topk;
    const int token_position = __shfl_sync(0xffffffffu, position, token % kTileTokens);
    const uint32_t first = __shfl_sync(0xffffffffu, sequence_token, token % kTileTokens);
    uint32_t entry = kNone;
    if (token < kTileTokens && token_position >= 0) {
      const int block = params.block_indices[(tile_begin + token) * params.index_token_stride +
                                             kv_head * params.index_head_stride + i % params.topk];
      if (block >= 0 && block <= token_position / params.block_size) {
        entry = (first << kBlockBits | block) << kTokenBits | token;
      }
    }
    if (i < entry_count) entries[i] = entry;
  }
  sort_entries<32>(entries, entry_count, lane, [] { __syncwarp(); });

  // The first entry of each block collects the tokens of those that follow. The result replaces the
  // entries from the front on, never one that is still to be read.
  int num_blocks = 0;
  uint32_t last_key = kNone;
  for (int base = 0; base < entry_count; base += 32) {
    const int i = base + lane;
    const uint32_t entry = i < entry_count ? entries[i] : kNone;
    const uint32_t key = entry >> kTokenBits;
    const uint32_t before = __shfl_up_sync(0xffffffffu, key, 1);
    const bool is_first = entry != kNone && key != (lane == 0 ? last_key : before);
    uint32_t chose = 1u << (entry & (kTileTokens - 1));
    if (is_first) {
      for (int next = i + 1; next < entry_count && entries[next] >> kTokenBits == key; ++next) {
        chose |= 1u << (entries[next] & (kTileTokens - 1));
      }
    }
    last_key = __shfl_sync(0xffffffffu, key, 31);
    const unsigned firsts = __ballot_sync(0xffffffffu, is_first);
    __syncwarp();  // the entries are read
    if (is_first) {
      constexpr uint32_t kBlockMask = (1u << kBlockBits) - 1;
      entries[num_blocks + __popc(firsts & ((1u << lane) - 1))] =
          (key & kBlockMask) << kTileTokens | chose;
    }
    num_blocks += __popc(firsts);
    if (last_key == kNone >> kTokenBits) break;  // only empty entries follow
  }
  __syncwarp();
  return num_blocks;
}

}  // namespace msa
