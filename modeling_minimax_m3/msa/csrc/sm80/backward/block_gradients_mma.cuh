// Gradients of one key block and the queries that chose it.
//
// Scores are computed transposed, keys x query rows, so that the probabilities and the gradients of
// the scores leave the accumulators as left operands of the products for the values' and keys'
// gradients. Only the gradients of the scores pass through shared memory: the queries' gradients
// sum over keys, which lie in different warps. That product runs one step behind the others, so
// that a step needs one barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "config.h"
#include "params.h"
#include "smxx/backward/schedule.h"
#include "smxx/backward/tile_turns.cuh"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"
#include "smxx/forward_kv_major/buckets.cuh"

namespace msa::sm80 {

// Where a 16-byte chunk of 8 query rows lies in the scores' gradients of 16 rows: a line of 32
// bytes for each key. Eight neighbouring keys lie in eight different bank groups.
__device__ __forceinline__ int score_offset(int key, int chunk) {
  return key * 32 + (chunk ^ (key >> 2 & 1)) * 16;
}

// A lane's ldmatrix rows of 16 x 16 elements. Across: a product sums over the elements of a line,
// and 8 lines make an n8 tile. Along: lines are m16 rows or, transposed, a product sums over them.
template <typename Config>
__device__ __forceinline__ uint32_t offset_across_lines() {
  const int lane = threadIdx.x % 32;
  return swizzled_offset<Config::kRowChunks>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
}
template <typename Config>
__device__ __forceinline__ uint32_t offset_along_lines() {
  const int lane = threadIdx.x % 32;
  return swizzled_offset<Config::kRowChunks>(lane & 15, lane >> 4);
}

// The 16 bytes that a thread copies of a row, and of every kCopyRows-th one after it.
struct CopyChunk {
  int row;
  int chunk;
  uint32_t offset;  // in shared memory
};

template <typename Config>
__device__ __forceinline__ CopyChunk chunk_of_thread() {
  const int row = threadIdx.x / Config::kRowChunks;
  const int chunk = threadIdx.x % Config::kRowChunks;
  return {row, chunk, swizzled_offset<Config::kRowChunks>(row, chunk)};
}

// Copies the keys and values of the tile's block; zeros past the end of the sequence.
template <typename Element, typename Config>
__device__ __forceinline__ void copy_keys_and_values(const ForwardParams& params,
                                                     const KvTile& tile, const CopyChunk& copy,
                                                     uint32_t keys_address,
                                                     uint32_t values_address) {
  const Element* keys = static_cast<const Element*>(params.key) +
                        tile.sequence.key_begin * params.key_token_stride +
                        tile.kv_head * params.key_head_stride + copy.chunk * 8;
  const Element* values = static_cast<const Element*>(params.value) +
                          tile.sequence.key_begin * params.value_token_stride +
                          tile.kv_head * params.value_head_stride + copy.chunk * 8;
#pragma unroll 4
  for (int row = 0; row < Config::kBlockSize; row += Config::kCopyRows) {
    const bool valid = tile.first_key + copy.row + row < tile.sequence.len_k;
    const int64_t token = valid ? tile.first_key + copy.row + row : 0;
    copy_async_16(keys_address + copy.offset + row * Config::kRowBytes,
                  keys + token * params.key_token_stride, valid);
    copy_async_16(values_address + copy.offset + row * Config::kRowBytes,
                  values + token * params.value_token_stride, valid);
  }
  commit_copies();
}

// The left operands of a warp's 16 keys and their values.
template <typename Config, int kSteps>
__device__ __forceinline__ void load_operands(uint32_t (&key)[kSteps][4],
                                              uint32_t (&value)[kSteps][4], uint32_t keys_address,
                                              uint32_t values_address, uint32_t along, int warp) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t offset = (along + warp * 16 * Config::kRowBytes) ^ (step * 32);
    load_matrix_x4(key[step], keys_address + offset);
    load_matrix_x4(value[step], values_address + offset);
  }
}

// Copies the pairs of a step's rows, of which the tile has `num_rows`.
template <typename Config>
__device__ __forceinline__ void copy_pairs(const BackwardSchedule& schedule, const KvTile& tile,
                                           const CopyChunk& copy, int num_rows, int step,
                                           RowInfo<Config::kRows>* infos) {
  if (copy.chunk != 0) return;
#pragma unroll
  for (int i = 0; i < Config::kCopies; ++i) {
    const int row = copy.row + i * Config::kCopyRows;
    const bool valid = step * Config::kRows + row < num_rows;
    const int query = valid ? (step * Config::kRows + row) >> schedule.q_heads_shift : 0;
    copy_async_4(shared_address(infos[step % Config::kInfoSteps].pair + row),
                 schedule.lists.pair_list + tile.list_begin + query, valid);
  }
}

// Copies the queries and output gradients of a step's rows to its stage, with what the rows carry
// beside them. Rows without a query are zeros, which add nothing to any sum.
template <typename Element, typename Config>
__device__ __forceinline__ void copy_rows(const BackwardParams& params,
                                          const BackwardSchedule& schedule, const KvTile& tile,
                                          const CopyChunk& copy, int pairs_per_token, int num_rows,
                                          int step, uint32_t stages_address,
                                          RowInfo<Config::kRows>* infos) {
  const ForwardParams& forward = params.forward;
  const KvSchedule& lists = schedule.lists;
  const int q_heads_per_kv = 1 << schedule.q_heads_shift;
  const uint32_t target =
      stages_address + step % Config::kStages * Config::kStageBytes + copy.offset;
  RowInfo<Config::kRows>& info = infos[step % Config::kInfoSteps];
#pragma unroll
  for (int i = 0; i < Config::kCopies; ++i) {
    const int row = copy.row + i * Config::kCopyRows;
    const bool valid = step * Config::kRows + row < num_rows;
    const int part_token = info.pair[row] / pairs_per_token;
    const int64_t token = lists.token_begin + part_token;
    const int head = tile.kv_head * q_heads_per_kv + (row & (q_heads_per_kv - 1));
    const Element* queries = static_cast<const Element*>(forward.query) +
                             token * forward.query_token_stride + head * forward.query_head_stride +
                             copy.chunk * 8;
    const Element* grads = static_cast<const Element*>(params.grad_out) +
                           token * params.grad_out_token_stride +
                           head * params.grad_out_head_stride + copy.chunk * 8;
    const uint32_t address = target + i * Config::kCopyRows * Config::kRowBytes;
    copy_async_16(address, queries, valid);
    copy_async_16(address + Config::kRowsBytes, grads, valid);
    if (copy.chunk == 0) {
      const int64_t place = token * forward.num_heads + head;
      copy_async_4(shared_address(info.lse + row), forward.lse + place, valid);
      copy_async_4(shared_address(info.delta + row), schedule.delta + place, valid);
      info.last_key[row] = tile.sequence.first_position - tile.sequence.query_begin +
                           lists.token_begin + part_token - tile.first_key;
    }
  }
  commit_copies();
}

// Products of a warp's 16 keys (or values) and 16 rows, over the channels: `address` is the lane's
// of the rows.
template <typename Element, int kSteps>
__device__ __forceinline__ void multiply_rows(float (&products)[2][4],
                                              const uint32_t (&left)[kSteps][4], uint32_t address) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    uint32_t rows[4];
    load_matrix_x4(rows, address ^ (i * 32));
    multiply_add<Element>(products[0], left[i], rows[0], rows[1]);
    multiply_add<Element>(products[1], left[i], rows[2], rows[3]);
  }
}

// Probabilities of a warp's 16 keys and the step's rows from `row` on, and the gradients of their
// scores, as left operands. `products` are those of values and output gradients. The gradients of
// the scores also go to `target`, the lane's.
template <typename Element, typename Config>
__device__ __forceinline__ void differentiate_softmax(
    const BackwardSchedule& schedule, const float (&scores)[2][4], const float (&products)[2][4],
    const RowInfo<Config::kRows>& info, int row, int warp, int lane, unsigned char* shared,
    int target, uint32_t (&probs)[4], uint32_t (&grad_scores)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int column = row + i * 8 + lane % 4 * 2;
    const float2 lse = *reinterpret_cast<const float2*>(info.lse + column);
    const float2 delta = *reinterpret_cast<const float2*>(info.delta + column);
    const int2 last = *reinterpret_cast<const int2*>(info.last_key + column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = warp * 16 + half * 8 + lane / 4;
      const float* score = scores[i] + 2 * half;
      const float* product = products[i] + 2 * half;
      const float first =
          place > last.x ? 0 : exp2_approx(score[0] * schedule.lists.scale_log2 - lse.x * kLog2E);
      const float second =
          place > last.y ? 0 : exp2_approx(score[1] * schedule.lists.scale_log2 - lse.y * kLog2E);
      probs[2 * i + half] = pack<Element>(first, second);
      grad_scores[2 * i + half] =
          pack<Element>(first * (product[0] - delta.x), second * (product[1] - delta.y));
      // Keys that differ by 8 share the permutation of score_offset.
      *reinterpret_cast<uint32_t*>(shared + ((target + half * 8 * 32) ^ (i * 16))) =
          grad_scores[2 * i + half];
    }
  }
}

// Adds what 16 rows give to the gradients of a warp's keys and values; addresses as in
// multiply_rows.
template <typename Element, int kSteps>
__device__ __forceinline__ void add_products(float (&grad_key)[2 * kSteps][4],
                                             float (&grad_value)[2 * kSteps][4],
                                             const uint32_t (&grad_scores)[4],
                                             const uint32_t (&probs)[4], uint32_t queries_address,
                                             uint32_t grads_address) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    uint32_t rows[4];
    load_matrix_x4_transposed(rows, grads_address ^ (i * 32));
    multiply_add<Element>(grad_value[2 * i], probs, rows[0], rows[1]);
    multiply_add<Element>(grad_value[2 * i + 1], probs, rows[2], rows[3]);
    load_matrix_x4_transposed(rows, queries_address ^ (i * 32));
    multiply_add<Element>(grad_key[2 * i], grad_scores, rows[0], rows[1]);
    multiply_add<Element>(grad_key[2 * i + 1], grad_scores, rows[2], rows[3]);
  }
}

// Computes and stores the gradients of the queries of the step before `next_step`: 16 rows x 32
// channels of a warp at a time.
template <typename Element, typename Config>
__device__ __forceinline__ void store_grad_query(const ForwardParams& params,
                                                 const BackwardSchedule& schedule, int num_rows,
                                                 int next_step, uint32_t scores_address,
                                                 uint32_t keys_address,
                                                 const RowInfo<Config::kRows>* infos) {
  constexpr int kChannelGroups = Config::kHeadDim / 32;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int q_heads_per_kv = 1 << schedule.q_heads_shift;
  const uint32_t grad_scores = scores_address + (next_step - 1) % 2 * Config::kScoreBytes +
                               score_offset((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  const uint32_t keys = keys_address + offset_along_lines<Config>();
  const int* pairs = infos[(next_step - 1) % Config::kInfoSteps].pair;
#pragma unroll 1
  for (int item = warp; item < Config::kRows / 16 * kChannelGroups; item += Config::kWarps) {
    const int first_row = item / kChannelGroups * 16;
    const int channels = item % kChannelGroups;
    float sums[4][4] = {};
#pragma unroll 4
    for (int key = 0; key < Config::kBlockSize; key += 16) {
      uint32_t left[4], right[2][4];
      load_matrix_x4_transposed(left,
                                grad_scores + first_row / 16 * Config::kScoreTileBytes + key * 32);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrix_x4_transposed(right[i],
                                  (keys + key * Config::kRowBytes) ^ (channels * 64 + i * 32));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        multiply_add<Element>(sums[i], left, right[i / 2][i % 2 * 2], right[i / 2][i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * 8 + lane / 4;
      if ((next_step - 1) * Config::kRows + row >= num_rows) continue;
      const int64_t target = (static_cast<int64_t>(pairs[row]) << schedule.q_heads_shift) +
                             (row & (q_heads_per_kv - 1));
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = pack<Element>(sums[i][2 * half] * params.softmax_scale,
                                 sums[i][2 * half + 1] * params.softmax_scale);
      }
      __stcs(static_cast<uint4*>(schedule.partial_grad_query) + target * Config::kRowChunks +
                 channels * 4 + lane % 4,
             make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// Adds a lane's sums of one row to float32 in global memory. All loads come before the stores,
// which they would wait for otherwise, and pass L1, where another tile's sums are unknown.
template <int kTiles>
__device__ __forceinline__ void add_row(float* row, const float (&sums)[kTiles][4], int half,
                                        float scale) {
  float2 totals[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) totals[i] = __ldcg(reinterpret_cast<float2*>(row + i * 8));
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    totals[i].x += sums[i][2 * half] * scale;
    totals[i].y += sums[i][2 * half + 1] * scale;
    __stcg(reinterpret_cast<float2*>(row + i * 8), totals[i]);
  }
}

// Adds a tile's gradients of keys and values to those of its block, when its turn has come.
template <typename Config, int kTiles>
__device__ __forceinline__ void add_in_turn(const ForwardParams& params,
                                            const BackwardSchedule& schedule, const KvTile& tile,
                                            const float (&grad_key)[kTiles][4],
                                            const float (&grad_value)[kTiles][4]) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int turn = turn_of(schedule, tile);
  if (threadIdx.x == 0) await_turn(schedule.bucket_turn + tile.bucket, turn);
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = tile.first_key + warp * 16 + half * 8 + lane / 4;
    if (place >= tile.sequence.len_k) continue;
    const int64_t row =
        static_cast<int64_t>(tile.sequence.key_begin + place) * params.num_kv_heads + tile.kv_head;
    const int64_t offset = row * Config::kHeadDim + lane % 4 * 2;
    add_row(schedule.grad_key + offset, grad_key, half, params.softmax_scale);
    add_row(schedule.grad_value + offset, grad_value, half, 1.0f);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) pass_turn(schedule.bucket_turn + tile.bucket, turn);
}

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    block_gradients_kernel(const BackwardParams params, const BackwardSchedule schedule) {
  using Storage = BackwardStorage<Config>;
  constexpr int kRowBytes = Config::kRowBytes;
  constexpr int kSteps = Config::kHeadDim / 16;

  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ KvTile tile;  // in registers it would not fit beside operands and sums
  const ForwardParams& forward = params.forward;
  if (threadIdx.x == 0) tile = find_tile(forward, schedule.lists, take_tile(schedule));
  __syncthreads();
  if (tile.num_queries == 0) return;

  const uint32_t stages_address = shared_address(shared);
  const uint32_t keys_address = stages_address + offsetof(Storage, keys);
  const uint32_t scores_address = stages_address + offsetof(Storage, score_gradients);
  auto* infos = reinterpret_cast<Storage*>(shared)->infos;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const CopyChunk copy = chunk_of_thread<Config>();
  const int num_rows = tile.num_queries << schedule.q_heads_shift;

  copy_pairs<Config>(schedule, tile, copy, num_rows, 0, infos);
  copy_keys_and_values<Element, Config>(forward, tile, copy, keys_address, stages_address);
  wait_copies<0>();
  __syncthreads();
  const uint32_t across = offset_across_lines<Config>();
  const uint32_t along = offset_along_lines<Config>();
  uint32_t key[kSteps][4], value[kSteps][4];
  load_operands<Config>(key, value, keys_address, stages_address, along, warp);
  __syncthreads();  // the values' place is free for the stages

  float grad_key[2 * kSteps][4], grad_value[2 * kSteps][4];
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) grad_key[i][j] = grad_value[i][j] = 0;
  }

  const int pairs_per_token = forward.num_kv_heads * forward.topk;
  const int num_steps = (num_rows + Config::kRows - 1) / Config::kRows;
  copy_pairs<Config>(schedule, tile, copy, num_rows, 1, infos);
  copy_rows<Element, Config>(params, schedule, tile, copy, pairs_per_token, num_rows, 0,
                             stages_address, infos);
  for (int step = 0; step <= num_steps; ++step) {
    wait_copies<0>();
    __syncthreads();  // this step's rows have landed, and every warp is done with the step before
    if (step + 1 < num_steps) {
      copy_pairs<Config>(schedule, tile, copy, num_rows, step + 2, infos);
      copy_rows<Element, Config>(params, schedule, tile, copy, pairs_per_token, num_rows, step + 1,
                                 stages_address, infos);
    }
    if (step > 0) {
      store_grad_query<Element, Config>(forward, schedule, num_rows, step, scores_address,
                                        keys_address, infos);
    }
    if (step == num_steps) break;

    const uint32_t queries_address = stages_address + step % Config::kStages * Config::kStageBytes;
    const uint32_t grads_address = queries_address + Config::kRowsBytes;
    const RowInfo<Config::kRows>& info = infos[step % Config::kInfoSteps];
    const int target = offsetof(Storage, score_gradients) + step % 2 * Config::kScoreBytes +
                       score_offset(warp * 16 + lane / 4, 0) + lane % 4 * 4;
    const int end_row = min(num_rows - step * Config::kRows, Config::kRows);
#pragma unroll 1
    for (int row = 0; row < end_row; row += 16) {
      float scores[2][4] = {}, products[2][4] = {};
      multiply_rows<Element>(scores, key, queries_address + across + row * kRowBytes);
      multiply_rows<Element>(products, value, grads_address + across + row * kRowBytes);
      uint32_t probs[4], grad_scores[4];
      differentiate_softmax<Element, Config>(schedule, scores, products, info, row, warp, lane,
                                             shared, target + row / 16 * Config::kScoreTileBytes,
                                             probs, grad_scores);
      add_products<Element, kSteps>(grad_key, grad_value, grad_scores, probs,
                                    queries_address + along + row * kRowBytes,
                                    grads_address + along + row * kRowBytes);
    }
  }
  add_in_turn<Config>(forward, schedule, tile, grad_key, grad_value);
}

}  // namespace msa::sm80
