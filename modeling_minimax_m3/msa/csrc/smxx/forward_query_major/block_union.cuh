// The sorted union of the blocks that the tokens of a query tile chose.
//
// An entry is block << 7 | token of the tile. Sorting the entries of all tokens brings those of one
// block together, in ascending order of blocks, whatever order, gaps or repetitions the ids come
// in.
#pragma once

#include <cstdint>

namespace msa {

constexpr int kEntryTokenBits = 7;
constexpr uint32_t kNoEntry = 0xffffffffu;
constexpr int kNoBlock = kNoEntry >> kEntryTokenBits;

__device__ __forceinline__ uint32_t make_entry(int block, int token) {
  return static_cast<uint32_t>(block) << kEntryTokenBits | static_cast<uint32_t>(token);
}

// A block of the union, as one warp sees it.
struct UnionBlock {
  int block;        // kNoBlock: past the last one
  uint32_t tokens;  // bit i: the warp's token i chose the block
  int next;         // first entry of the next block
};

// Reads the block whose entries start at `begin`; all lanes of a warp take part.
__device__ __forceinline__ UnionBlock read_union_block(const uint32_t* entries, int count,
                                                       int begin, int warp_token, int warp_tokens) {
  UnionBlock result = {kNoBlock, 0, begin};
  if (begin < count) result.block = static_cast<int>(entries[begin] >> kEntryTokenBits);
  if (result.block == kNoBlock) return result;
  const int lane = threadIdx.x % 32;
  int equal;
  do {
    const int index = result.next + lane;
    const uint32_t entry = index < count ? entries[index] : kNoEntry;
    const bool is_equal = static_cast<int>(entry >> kEntryTokenBits) == result.block;
    const int token = static_cast<int>(entry & ((1u << kEntryTokenBits) - 1)) - warp_token;
    const bool is_ours = is_equal && token >= 0 && token < warp_tokens;
    result.tokens |= __reduce_or_sync(0xffffffffu, is_ours ? 1u << token : 0u);
    equal = __popc(__ballot_sync(0xffffffffu, is_equal));
    result.next += equal;
  } while (equal == 32);
  return result;
}

}  // namespace msa
