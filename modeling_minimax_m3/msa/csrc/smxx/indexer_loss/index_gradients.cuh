// From score gradients to those of index queries and index keys, KV-major.
//
// A thread block keeps the index keys of one block and the sums of their gradients (registers) and
// passes its pairs by, 64 at a time: score gradients times index keys are the pairs' part of the
// gradients of their queries, score gradients transposed times index queries are added to the sums.
// Those go to float32 sums in global memory, tile after tile of a block in ascending order of
// heads and tokens, so that results repeat bit for bit: a tile may wait for those before it, which
// are running, because thread blocks take tiles in ascending order when they start.
//
// Score gradients come from memory, or, where the value saved the teacher's probabilities, from
// those and the index scores, which are computed once more.
#pragma once

#include <cuda_runtime.h>

#include "config.h"
#include "operands.cuh"
#include "pairs.cuh"
#include "schedule.h"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"
#include "smxx/common/turns.cuh"
#include "smxx/forward_kv_major/buckets.cuh"

namespace msa {

// How many tiles of the same block, of this head and those before it, come first.
__device__ __forceinline__ int turn_of(const KvSchedule& lists, const KvTile& tile) {
  const int block = tile.bucket % lists.buckets_per_head;
  int turn = (tile.list_begin - lists.bucket_begin[tile.bucket]) / IndexerLossConfig::kTilePairs;
  for (int bucket = block; bucket < tile.bucket; bucket += lists.buckets_per_head) {
    turn += lists.tile_begin[bucket + 1] - lists.tile_begin[bucket];
  }
  return turn;
}

// The rows of a lane's index scores, of the 64 of a pass.
__device__ __forceinline__ int own_row(int half) {
  return static_cast<int>(threadIdx.x) / 32 % 4 * 16 + half * 8 +
         static_cast<int>(threadIdx.x) % 32 / 4;
}

// Adds to two floats that nobody else adds to meanwhile.
__device__ __forceinline__ void add_without_waiting(float* target, float2 values) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float2*>(target), values);
#else
  atomicAdd(target, values.x);
  atomicAdd(target + 1, values.y);
#endif
}

// Whose score gradients are computed here, besides scores and probabilities: the pair of a row.
struct RowTerms {
  float index_lse;
  float grad_kl;
  int last_key;  // as last_visible_key
};

__device__ __forceinline__ RowTerms load_row_terms(const IndexerLossParams& params,
                                                   const KvTile& tile, int token) {
  const int64_t row =
      static_cast<int64_t>(max(token, 0)) * params.attention.num_kv_heads + tile.kv_head;
  return {params.index_lse[row], params.grad_kl[row], last_visible_key(tile, token)};
}

// Of two keys, from their index scores, in place of their probabilities.
template <typename Element>
__device__ __forceinline__ void store_two_gradients(unsigned char* place, float2 scores, int key,
                                                    const RowTerms& row, float scale_log2,
                                                    float scale) {
  const float2 saved = unpack<__half>(*reinterpret_cast<const uint32_t*>(place));
  auto gradient = [&](float score, float probability, bool visible) {
    const float r = exp2_approx(score * scale_log2 - row.index_lse * kLog2E);
    return visible ? (r - probability * (1 / kSavedProbsScale)) * (row.grad_kl * scale) : 0;
  };
  *reinterpret_cast<uint32_t*>(place) =
      pack<Element>(gradient(scores.x, saved.x, key <= row.last_key),
                    gradient(scores.y, saved.y, key < row.last_key));
}

template <typename Element, typename Config, typename Products, bool kTeacherSaved>
__global__ void __launch_bounds__(Config::kThreads, 2)
    index_gradients_kernel(const IndexerLossParams params, const IndexerLossSchedule schedule) {
  constexpr int kIndexDim = Config::kIndexDim;
  constexpr int kRowChunks = kIndexDim / 8;
  constexpr int kTilePairs = IndexerLossConfig::kTilePairs;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int block_size = params.attention.block_size;
  const int stage_bytes = Config::stage_bytes(block_size);
  auto* pairs = reinterpret_cast<int32_t*>(shared + block_size * kIndexDim * 2 +
                                           Config::kStages * stage_bytes);
  if (threadIdx.x == 0) pairs[0] = atomicAdd(schedule.next_tile, 1);
  __syncthreads();
  const KvTile tile = find_tile(params.attention, schedule.lists, pairs[0]);
  if (tile.num_queries == 0) return;
  __syncthreads();  // its number is read

  const uint32_t keys_address = shared_address(shared);
  const uint32_t stages_address = keys_address + block_size * kIndexDim * 2;
  const int gradient_bytes = stage_bytes - Config::kQueryBytes;
  for (int i = threadIdx.x; i < kTilePairs; i += Config::kThreads) {
    pairs[i] = i < tile.num_queries ? schedule.lists.pair_list[tile.list_begin + i] : -1;
  }
  const int64_t first_key = tile.sequence.key_begin + tile.first_key;
  const int num_keys = min(tile.sequence.len_k - tile.first_key, block_size);
  {
    const auto* keys = static_cast<const Element*>(params.index_key);
    for (int i = threadIdx.x; i < block_size * kRowChunks; i += Config::kThreads) {
      const int row = i / kRowChunks, chunk = i % kRowChunks;
      const bool valid = row < num_keys;
      copy_async_16(
          keys_address + panel_offset(row, chunk, block_size),
          keys + (first_key + (valid ? row : 0)) * params.index_key_token_stride + chunk * 8,
          valid);
    }
  }
  __syncthreads();  // the pairs are there

  const int pairs_per_token = params.attention.num_kv_heads * params.attention.topk;
  const float scale = schedule.factors[0];
  auto copy_pass = [&](int first, int stage) {
    const uint32_t gradients = stages_address + stage * stage_bytes;
    const uint32_t queries = gradients + gradient_bytes;
    const int gradient_chunks = block_size / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < Config::kPassPairs * gradient_chunks; i += Config::kThreads) {
      const int row = i / gradient_chunks, chunk = i % gradient_chunks;
      // Of a saved teacher a pair's place is its own, of score gradients that in the list.
      const int pair = kTeacherSaved ? pairs[first + row] : tile.list_begin + first + row;
      const bool valid = kTeacherSaved ? pair >= 0 : first + row < tile.num_queries;
      const int64_t element = static_cast<int64_t>(valid ? pair : 0) * block_size + chunk * 8;
      const void* source;
      if constexpr (kTeacherSaved) {
        source = schedule.saved_probs + element;
      } else {
        source = static_cast<const Element*>(schedule.score_gradients) + element;
      }
      copy_async_16(gradients + panel_offset(row, chunk, Config::kPassPairs), source, valid);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < Config::kPassPairs * kRowChunks; i += Config::kThreads) {
      const int row = i / kRowChunks, chunk = i % kRowChunks;
      const int pair = pairs[first + row];
      const int token = schedule.lists.token_begin + max(pair, 0) / pairs_per_token;
      copy_async_16(queries + panel_offset(row, chunk, Config::kPassPairs),
                    static_cast<const Element*>(params.index_query) +
                        token * params.index_query_token_stride +
                        tile.kv_head * params.index_query_head_stride + chunk * 8,
                    pair >= 0);
    }
    commit_copies();
  };

  // Loaded a pass ahead.
  RowTerms row_terms[2];
  auto load_terms = [&](int first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = pairs[first + own_row(half)];
      row_terms[half] = load_row_terms(
          params, tile, pair < 0 ? -1 : schedule.lists.token_begin + pair / pairs_per_token);
    }
  };

  Products products;
  copy_pass(0, 0);
  if constexpr (kTeacherSaved) load_terms(0);
  for (int first = 0, stage = 0; first < tile.num_queries;
       first += Config::kPassPairs, stage ^= 1) {
    wait_copies<0>();
    Products::publish_writes();
    __syncthreads();  // this pass, and at first the keys, have landed; the last one is read
    const bool is_last = first + Config::kPassPairs >= tile.num_queries;
    if (!is_last) copy_pass(first + Config::kPassPairs, stage ^ 1);
    const uint32_t gradients = stages_address + stage * stage_bytes;
    if constexpr (kTeacherSaved) {
      unsigned char* stored = shared + (gradients - keys_address);
      Products::scores(gradients + gradient_bytes, keys_address, block_size,
                       [&](int half, int row, int key, float2 scores) {
                         store_two_gradients<Element>(
                             stored + panel_offset(row, key / 8, Config::kPassPairs) + key % 8 * 2,
                             scores, key, row_terms[half], schedule.index_scale_log2, scale);
                       });
      if (!is_last) load_terms(first + Config::kPassPairs);
      Products::publish_writes();
      __syncthreads();  // they are there
    }
    products.pass(gradients, gradients + gradient_bytes, keys_address, block_size,
                  [&](int row, int channel, float2 values) {
                    const int pair = pairs[first + row];
                    if (pair < 0) return;
                    float* target =
                        schedule.partial_index_query + static_cast<int64_t>(pair) * kIndexDim;
                    *reinterpret_cast<float2*>(target + channel) = values;
                  });
  }

  int32_t* block_turn = schedule.block_turn + tile.bucket % schedule.lists.buckets_per_head;
  const int turn = turn_of(schedule.lists, tile);
  if (threadIdx.x == 0) await_turn(block_turn, turn);
  __syncthreads();
  products.finish([&](int row, int channel, float2 values) {
    if (row >= num_keys) return;
    add_without_waiting(schedule.index_key_sums + (first_key + row) * kIndexDim + channel, values);
  });
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) pass_turn(block_turn, turn);
}

}  // namespace msa
