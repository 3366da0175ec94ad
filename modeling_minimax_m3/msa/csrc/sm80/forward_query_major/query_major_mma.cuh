// Attention of every query over the blocks listed for it, query-major.
//
// A thread block owns a tile of neighbouring query tokens with all heads of one key/value head,
// builds the sorted union of their blocks and walks it once. Keys and values of a block are loaded
// once for the tile; a warp whose tokens did not choose the block passes it over, and so does a
// half of a warp. So arithmetic follows the selection whatever it is, and loads shrink as
// neighbouring tokens share blocks.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "config.h"
#include "online_softmax.cuh"
#include "params.h"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/bitonic_sort.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"
#include "smxx/common/quads.cuh"
#include "smxx/common/sequences.cuh"
#include "smxx/forward_query_major/block_union.cuh"

namespace msa::sm80 {

struct ForwardSchedule {
  int num_tiles;                  // query tiles of one key/value head
  int q_heads_shift;              // log2 of the query heads of a key/value head
  int entry_count;                // power of two, at least the tokens of a tile times topk
  float scale_log2;               // softmax_scale * log2(e)
  const uint8_t* is_query_major;  // tiles to work on, see smxx/forward_order/; nullptr: all
};

// The keys that a warp's rows see, counted from the first key of a tile.
struct UnionVisibleKeys {
  uint32_t tokens;    // bit i: token i of the warp chose the block
  int position;       // of the warp's first token
  int q_heads_shift;  // log2 of the rows of a token

  // The last visible key of a row, -1 when there is none.
  __device__ __forceinline__ int limit(int row) const {
    const int token = row >> q_heads_shift;
    return tokens >> token & 1 ? position + token : -1;
  }
};

// Where the keys and values of the sequence at hand lie.
template <typename Element>
struct KeySource {
  const Element* key;  // of the first token
  const Element* value;
  int len_k;
  int last_position;  // of the tile's last query
};

template <typename Element>
__device__ __forceinline__ KeySource<Element> find_keys(const ForwardParams& params,
                                                        const Sequence& sequence, int kv_head,
                                                        int last_position) {
  return {static_cast<const Element*>(params.key) + sequence.key_begin * params.key_token_stride +
              kv_head * params.key_head_stride,
          static_cast<const Element*>(params.value) +
              sequence.key_begin * params.value_token_stride + kv_head * params.value_head_stride,
          sequence.len_k, last_position};
}

// The query tokens of a thread block.
struct QueryTile {
  int kv_head;
  int q_heads_per_kv;
  int begin;  // query tokens [begin, end)
  int end;
  int warp_tokens;  // of each warp
  int warp_token;   // this warp's first token, counted from `begin`
};

template <typename Config>
__device__ __forceinline__ QueryTile find_tile(const ForwardParams& params,
                                               const ForwardSchedule& schedule, int kv_head) {
  const int tokens = Config::kRows >> schedule.q_heads_shift;
  const int warp_tokens = Config::kWarpRows >> schedule.q_heads_shift;
  const int begin = static_cast<int>(blockIdx.x % schedule.num_tiles) * tokens;
  return {kv_head,     1 << schedule.q_heads_shift,
          begin,       min(begin + tokens, params.total_q),
          warp_tokens, static_cast<int>(threadIdx.x / 32) * warp_tokens};
}

// Whether another kernel takes the tile of this thread block.
__device__ __forceinline__ bool is_passed_over(const ForwardParams& params,
                                               const ForwardSchedule& schedule, int kv_head) {
  return schedule.is_query_major != nullptr &&
         schedule.is_query_major[static_cast<int64_t>(blockIdx.x % schedule.num_tiles) *
                                     params.num_kv_heads +
                                 kv_head] == 0;
}

// Copies the tile's queries to shared memory, one after the other; zeros past the last token.
template <typename Element, typename Config>
__device__ __forceinline__ void copy_queries(const ForwardParams& params,
                                             const ForwardSchedule& schedule, const QueryTile& tile,
                                             uint32_t target) {
  constexpr int kCopyRows = Config::kThreads / Config::kRowChunks;
  const int copy_row = threadIdx.x / Config::kRowChunks;
  const int copy_chunk = threadIdx.x % Config::kRowChunks;
  const uint32_t copy_offset = swizzled_offset<Config::kRowChunks>(copy_row, copy_chunk);
  const Element* queries =
      static_cast<const Element*>(params.query) +
      static_cast<int64_t>(tile.kv_head) * tile.q_heads_per_kv * params.query_head_stride +
      copy_chunk * 8;
#pragma unroll 4
  for (int row = copy_row; row < Config::kRows; row += kCopyRows) {
    const int token = tile.begin + (row >> schedule.q_heads_shift);
    const bool valid = token < tile.end;
    copy_async_16(target + copy_offset + (row - copy_row) * Config::kRowBytes,
                  queries + (valid ? token : tile.begin) * params.query_token_stride +
                      (row & (tile.q_heads_per_kv - 1)) * params.query_head_stride,
                  valid);
  }
  commit_copies();
}

// Fills `entries` with the blocks that query tokens [token_begin, token_end) chose, sorted. Ids
// that name no visible block are dropped here and never become an address.
template <typename Config>
__device__ __forceinline__ void sort_chosen_blocks(const ForwardParams& params,
                                                   const ForwardSchedule& schedule,
                                                   const QueryTile& tile, int position_offset,
                                                   int token_begin, int token_end,
                                                   uint32_t* entries) {
  for (int i = threadIdx.x; i < schedule.entry_count; i += Config::kThreads) {
    const int tile_token = i / params.topk;
    const int token = tile.begin + tile_token;
    uint32_t entry = kNoEntry;
    if (token >= token_begin && token < token_end) {
      const int block =
          params.block_indices[token * params.index_token_stride +
                               tile.kv_head * params.index_head_stride + i % params.topk];
      const int position = position_offset + token;
      if (block >= 0 && position >= 0 && block <= position / params.block_size) {
        entry = make_entry(block, tile_token);
      }
    }
    entries[i] = entry;
  }
  sort_entries<Config::kThreads>(entries, schedule.entry_count, threadIdx.x,
                                 [] { __syncthreads(); });
}

// Copies a tile of keys and, behind them, their values to shared memory; zeros past the end of the
// sequence.
template <typename Element, typename Config>
__device__ __forceinline__ void copy_keys_and_values(const ForwardParams& params,
                                                     const KeySource<Element>& source,
                                                     int first_key, uint32_t target) {
  constexpr int kCopyRows = Config::kThreads / Config::kRowChunks;
  static_assert(kCopyRows % 8 == 0, "the rows of a thread must share one swizzle");
  const int copy_row = threadIdx.x / Config::kRowChunks;
  const int copy_chunk = threadIdx.x % Config::kRowChunks;
  const uint32_t address = target + swizzled_offset<Config::kRowChunks>(copy_row, copy_chunk);
  const Element* keys = source.key + copy_chunk * 8;
  const Element* values = source.value + copy_chunk * 8;
  const int len_k = source.len_k;
#pragma unroll
  for (int row = 0; row < Config::kTileKeys; row += kCopyRows) {
    const int key = first_key + copy_row + row;
    const bool valid = key < len_k;
    const int64_t token = valid ? key : 0;
    copy_async_16(address + row * Config::kRowBytes, keys + token * params.key_token_stride, valid);
    copy_async_16(address + row * Config::kRowBytes + Config::kTileBytes,
                  values + token * params.value_token_stride, valid);
  }
}

// A warp attends to a tile of keys and values at `stage_address`; a half of the warp whose tokens
// did not choose the block passes it over. With `masks`, rows see the keys that `visible` says.
template <typename Element, typename Config>
__device__ __forceinline__ void attend_tile(
    RunningSoftmax<Config>& running,
    const uint32_t (&query)[Config::kRowTiles][Config::kHeadDim / 16][4],
    const ForwardSchedule& schedule, const UnionVisibleKeys& visible, bool masks, int warp_tokens,
    uint32_t stage_address) {
  const int lane = threadIdx.x % 32;
  // A lane's ldmatrix rows within 16 keys: keys feed a product over channels, values one over keys.
  const uint32_t key_offset =
      swizzled_offset<Config::kRowChunks>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  const uint32_t value_offset =
      Config::kTileBytes + swizzled_offset<Config::kRowChunks>(lane & 15, lane >> 4);
  auto attend = [&](auto begin, auto end) {
#pragma unroll 1
    for (int keys = 0; keys < Config::kTileKeys; keys += 16) {
      attend_16_keys<Element, Config, decltype(begin)::value, decltype(end)::value>(
          running, query, stage_address + key_offset + keys * Config::kRowBytes,
          stage_address + value_offset + keys * Config::kRowBytes, schedule.scale_log2, masks, keys,
          visible);
    }
  };
  // The tokens of the warp's first m16 tile; it has two or more.
  const uint32_t low_tokens = (1u << (warp_tokens / 2)) - 1;
  const bool low = visible.tokens & low_tokens;
  const bool high = visible.tokens & ~low_tokens;
  using Zero = std::integral_constant<int, 0>;
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (low && high) {
    attend(Zero{}, Two{});
  } else if (low) {
    attend(Zero{}, One{});
  } else if (high) {
    attend(One{}, Two{});
  }
}

// The outputs of a warp's rows, which pass through its part of the stages, `staged`.
template <typename Element, typename Config>
__device__ __forceinline__ void store_outputs(const ForwardParams& params,
                                              const ForwardSchedule& schedule,
                                              const QueryTile& tile,
                                              const RunningSoftmax<Config>& running,
                                              unsigned char* staged) {
  constexpr int kRowChunks = Config::kRowChunks;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(running.sum[i][half]);
      const float inverse = sum == 0 ? 0 : 1 / sum;
      const int row = i * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int chunk = 0; chunk < kRowChunks; ++chunk) {
        *reinterpret_cast<uint32_t*>(staged + swizzled_offset<kRowChunks>(row, chunk) +
                                     lane % 4 * 4) =
            pack<Element>(running.out[i][chunk][2 * half] * inverse,
                          running.out[i][chunk][2 * half + 1] * inverse);
      }
      const int token = tile.begin + tile.warp_token + (row >> schedule.q_heads_shift);
      if (lane % 4 == 0 && token < tile.end) {
        params.lse[static_cast<int64_t>(token) * params.num_heads +
                   tile.kv_head * tile.q_heads_per_kv + (row & (tile.q_heads_per_kv - 1))] =
            sum == 0 ? -INFINITY : (running.reference[i][half] + log2f(sum)) * kLn2;
      }
    }
  }
  __syncwarp();
  for (int chunk = lane; chunk < Config::kWarpRows * kRowChunks; chunk += 32) {
    const int row = chunk / kRowChunks;
    const int token = tile.begin + tile.warp_token + (row >> schedule.q_heads_shift);
    if (token >= tile.end) continue;
    const int64_t head = static_cast<int64_t>(token) * params.num_heads +
                         tile.kv_head * tile.q_heads_per_kv + (row & (tile.q_heads_per_kv - 1));
    reinterpret_cast<uint4*>(params.out)[head * kRowChunks + chunk % kRowChunks] =
        *reinterpret_cast<const uint4*>(staged +
                                        swizzled_offset<kRowChunks>(row, chunk % kRowChunks));
  }
}

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    query_major_kernel(const ForwardParams params, const ForwardSchedule schedule) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ KeySource<Element> source;  // in registers it would not fit beside queries and outputs
  uint32_t* entries = reinterpret_cast<uint32_t*>(shared + Config::kStages * Config::kStageBytes);
  const uint32_t stages_address = shared_address(shared);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  const int kv_head = blockIdx.x / schedule.num_tiles;
  if (is_passed_over(params, schedule, kv_head)) return;
  const QueryTile tile = find_tile<Config>(params, schedule, kv_head);
  copy_queries<Element, Config>(params, schedule, tile, stages_address);
  wait_copies<0>();
  __syncthreads();
  uint32_t query[Config::kRowTiles][Config::kHeadDim / 16][4];
  load_fragments(query,
                 stages_address + warp * Config::kWarpRows * Config::kRowBytes +
                     swizzled_offset<Config::kRowChunks>(lane & 15, lane >> 4),
                 16 * Config::kRowBytes);
  RunningSoftmax<Config> running;
  running.clear();

  const auto attend_sequence = [&](const Sequence& sequence, int token_begin, int token_end) {
    const int position_offset = sequence.first_position - sequence.query_begin;
    const int first_position = position_offset + token_begin;
    __syncthreads();  // every warp is done with the source, the entries and the stages
    if (threadIdx.x == 0) {
      source = find_keys<Element>(params, sequence, kv_head, position_offset + token_end - 1);
    }
    sort_chosen_blocks<Config>(params, schedule, tile, position_offset, token_begin, token_end,
                               entries);

    auto read_block = [&](int first_entry) {
      return read_union_block(entries, schedule.entry_count, first_entry, tile.warp_token,
                              tile.warp_tokens);
    };
    constexpr int kNoKey = -1;
    UnionBlock block = read_block(0);
    if (block.block == kNoBlock) return;
    int first_key = block.block * params.block_size;
    uint32_t tokens = block.tokens;  // of the warp, those that chose this tile's block
    int stage = 0;                   // byte offset
    copy_keys_and_values<Element, Config>(params, source, first_key, stages_address + stage);
    commit_copies();
    while (true) {
      // The tile after this one: the rest of the block, unless no query sees it, or the next
      // block.
      int next_key = first_key + Config::kTileKeys;
      if (next_key % params.block_size == 0 || next_key > source.last_position) {
        block = read_block(block.next);
        next_key = block.block == kNoBlock ? kNoKey : block.block * params.block_size;
      }
      wait_copies<0>();
      __syncthreads();  // this tile has landed, and every warp is done with the other stage
      if (next_key != kNoKey) {
        copy_keys_and_values<Element, Config>(params, source, next_key,
                                              stages_address + (stage ^ Config::kStageBytes));
      }
      commit_copies();

      // With two tokens a warp, each fills an m16 tile, and those that did not choose the block
      // are passed over whole.
      const bool masks = first_key + Config::kTileKeys - 1 > first_position || tile.warp_tokens > 2;
      const UnionVisibleKeys visible = {tokens,
                                        position_offset + tile.begin + tile.warp_token - first_key,
                                        schedule.q_heads_shift};
      attend_tile<Element, Config>(running, query, schedule, visible, masks, tile.warp_tokens,
                                   stages_address + stage);
      if (next_key == kNoKey) break;
      first_key = next_key;
      tokens = block.tokens;
      stage ^= Config::kStageBytes;
    }
  };
  for_each_sequence(params, tile.begin, tile.end, attend_sequence);

  __syncthreads();  // the stages become the outputs' way to global memory
  store_outputs<Element, Config>(params, schedule, tile, running,
                                 shared + warp * Config::kWarpRows * Config::kRowBytes);
}

}  // namespace msa::sm80
