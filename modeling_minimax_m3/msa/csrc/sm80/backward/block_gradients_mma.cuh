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

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    block_gradients_kernel(const BackwardParams params, const BackwardSchedule schedule) {
  using Storage = BackwardStorage<Config>;
  constexpr int kRows = Config::kRows;
  constexpr int kRowChunks = Config::kRowChunks;
  constexpr int kRowBytes = Config::kRowBytes;
  constexpr int kBlockSize = Config::kBlockSize;
  constexpr int kChannelSteps = Config::kHeadDim / 16;
  constexpr int kChannelGroups = Config::kHeadDim / 32;
  constexpr int kCopyRows = Config::kThreads / kRowChunks;  // rows that all threads copy at once
  constexpr int kCopies = kRows / kCopyRows;
  constexpr int kScoreTileBytes = kBlockSize * 32;  // of 16 rows
  static_assert(kCopyRows % 8 == 0, "the rows of a thread must share one swizzle");

  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ KvTile tile;  // in registers it would not fit beside operands and sums
  const ForwardParams& forward = params.forward;
  const KvSchedule& lists = schedule.lists;
  if (threadIdx.x == 0) {
    tile = find_tile(forward, lists, take_tile(schedule));
  }
  __syncthreads();
  if (tile.num_queries == 0) return;

  const uint32_t stages_address = shared_address(shared);
  const uint32_t keys_address = stages_address + offsetof(Storage, keys);
  const uint32_t scores_address = stages_address + offsetof(Storage, score_gradients);
  auto* infos = reinterpret_cast<Storage*>(shared)->infos;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int copy_row = threadIdx.x / kRowChunks;
  const int copy_chunk = threadIdx.x % kRowChunks;
  const uint32_t copy_offset = swizzled_offset<kRowChunks>(copy_row, copy_chunk);

  const int num_rows = tile.num_queries << schedule.q_heads_shift;
  auto copy_pairs = [&](int step) {
    if (copy_chunk != 0) return;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = copy_row + i * kCopyRows;
      const bool valid = step * kRows + row < num_rows;
      const int query = valid ? (step * kRows + row) >> schedule.q_heads_shift : 0;
      copy_async_4(shared_address(infos[step % Config::kInfoSteps].pair + row),
                   lists.pair_list + tile.list_begin + query, valid);
    }
  };
  copy_pairs(0);
  {
    const Element* keys = static_cast<const Element*>(forward.key) +
                          tile.sequence.key_begin * forward.key_token_stride +
                          tile.kv_head * forward.key_head_stride + copy_chunk * 8;
    const Element* values = static_cast<const Element*>(forward.value) +
                            tile.sequence.key_begin * forward.value_token_stride +
                            tile.kv_head * forward.value_head_stride + copy_chunk * 8;
#pragma unroll 4
    for (int row = 0; row < kBlockSize; row += kCopyRows) {
      const bool valid = tile.first_key + copy_row + row < tile.sequence.len_k;
      const int64_t token = valid ? tile.first_key + copy_row + row : 0;
      copy_async_16(keys_address + copy_offset + row * kRowBytes,
                    keys + token * forward.key_token_stride, valid);
      copy_async_16(stages_address + copy_offset + row * kRowBytes,
                    values + token * forward.value_token_stride, valid);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
  }
  // A lane's ldmatrix rows of 16 x 16 elements: `across` sums over the elements of a line, where 8
  // lines make an n8 tile; `along` takes lines as m16 rows or, transposed, sums over lines.
  const uint32_t across =
      swizzled_offset<kRowChunks>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  const uint32_t along = swizzled_offset<kRowChunks>(lane & 15, lane >> 4);
  uint32_t key[kChannelSteps][4], value[kChannelSteps][4];
#pragma unroll
  for (int step = 0; step < kChannelSteps; ++step) {
    const uint32_t offset = (along + warp * 16 * kRowBytes) ^ (step * 32);
    load_matrix_x4(key[step], keys_address + offset);
    load_matrix_x4(value[step], stages_address + offset);
  }
  __syncthreads();  // the values' place is free for the stages

  const int pairs_per_token = forward.num_kv_heads * forward.topk;
  const int q_heads_per_kv = 1 << schedule.q_heads_shift;
  // Rows without a query are zeros, which add nothing to any sum.
  auto copy_rows = [&](int step) {
    const uint32_t target =
        stages_address + step % Config::kStages * Config::kStageBytes + copy_offset;
    RowInfo<kRows>& info = infos[step % Config::kInfoSteps];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = copy_row + i * kCopyRows;
      const bool valid = step * kRows + row < num_rows;
      const int part_token = info.pair[row] / pairs_per_token;
      const int64_t token = lists.token_begin + part_token;
      const int head = tile.kv_head * q_heads_per_kv + (row & (q_heads_per_kv - 1));
      const Element* queries = static_cast<const Element*>(forward.query) +
                               token * forward.query_token_stride +
                               head * forward.query_head_stride + copy_chunk * 8;
      const Element* grads = static_cast<const Element*>(params.grad_out) +
                             token * params.grad_out_token_stride +
                             head * params.grad_out_head_stride + copy_chunk * 8;
      copy_async_16(target + i * kCopyRows * kRowBytes, queries, valid);
      copy_async_16(target + i * kCopyRows * kRowBytes + Config::kRowsBytes, grads, valid);
      if (copy_chunk == 0) {
        const int64_t place = token * forward.num_heads + head;
        copy_async_4(shared_address(info.lse + row), forward.lse + place, valid);
        copy_async_4(shared_address(info.delta + row), schedule.delta + place, valid);
        info.last_key[row] = tile.sequence.first_position - tile.sequence.query_begin +
                             lists.token_begin + part_token - tile.first_key;
      }
    }
    commit_copies();
  };

  float grad_key[2 * kChannelSteps][4], grad_value[2 * kChannelSteps][4];
#pragma unroll
  for (int i = 0; i < 2 * kChannelSteps; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) grad_key[i][j] = grad_value[i][j] = 0;
  }

  const int num_steps = (num_rows + kRows - 1) / kRows;
  copy_pairs(1);
  copy_rows(0);
  for (int step = 0; step <= num_steps; ++step) {
    wait_copies<0>();
    __syncthreads();  // this step's rows have landed, and every warp is done with the step before
    if (step + 1 < num_steps) {
      copy_pairs(step + 2);
      copy_rows(step + 1);
    }

    if (step > 0) {
      // Gradients of the last step's queries: 16 rows x 32 channels at a time.
      const uint32_t grad_scores = scores_address + (step - 1) % 2 * Config::kScoreBytes +
                                   score_offset((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
      const int* pairs = infos[(step - 1) % Config::kInfoSteps].pair;
#pragma unroll 1
      for (int item = warp; item < kRows / 16 * kChannelGroups; item += Config::kWarps) {
        const int first_row = item / kChannelGroups * 16;
        const int channels = item % kChannelGroups;
        float sums[4][4] = {};
#pragma unroll 4
        for (int keys = 0; keys < kBlockSize; keys += 16) {
          uint32_t left[4], right[2][4];
          load_matrix_x4_transposed(left,
                                    grad_scores + first_row / 16 * kScoreTileBytes + keys * 32);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            load_matrix_x4_transposed(
                right[i], (keys_address + along + keys * kRowBytes) ^ (channels * 64 + i * 32));
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            multiply_add<Element>(sums[i], left, right[i / 2][i % 2 * 2],
                                  right[i / 2][i % 2 * 2 + 1]);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + half * 8 + lane / 4;
          if ((step - 1) * kRows + row >= num_rows) continue;
          const int64_t target = (static_cast<int64_t>(pairs[row]) << schedule.q_heads_shift) +
                                 (row & (q_heads_per_kv - 1));
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            words[i] = pack<Element>(sums[i][2 * half] * forward.softmax_scale,
                                     sums[i][2 * half + 1] * forward.softmax_scale);
          }
          __stcs(static_cast<uint4*>(schedule.partial_grad_query) + target * kRowChunks +
                     channels * 4 + lane % 4,
                 make_uint4(words[0], words[1], words[2], words[3]));
        }
      }
    }
    if (step == num_steps) break;

    const uint32_t queries_address = stages_address + step % Config::kStages * Config::kStageBytes;
    const uint32_t grads_address = queries_address + Config::kRowsBytes;
    const RowInfo<kRows>& info = infos[step % Config::kInfoSteps];
    const int grad_scores = offsetof(Storage, score_gradients) + step % 2 * Config::kScoreBytes +
                            score_offset(warp * 16 + lane / 4, 0) + lane % 4 * 4;
    const int end_row = min(num_rows - step * kRows, kRows);
#pragma unroll 1
    for (int row = 0; row < end_row; row += 16) {
      float scores[2][4] = {}, products[2][4] = {};
#pragma unroll
      for (int i = 0; i < kChannelSteps; ++i) {
        uint32_t rows[4];
        load_matrix_x4(rows, (queries_address + across + row * kRowBytes) ^ (i * 32));
        multiply_add<Element>(scores[0], key[i], rows[0], rows[1]);
        multiply_add<Element>(scores[1], key[i], rows[2], rows[3]);
      }
#pragma unroll
      for (int i = 0; i < kChannelSteps; ++i) {
        uint32_t rows[4];
        load_matrix_x4(rows, (grads_address + across + row * kRowBytes) ^ (i * 32));
        multiply_add<Element>(products[0], value[i], rows[0], rows[1]);
        multiply_add<Element>(products[1], value[i], rows[2], rows[3]);
      }
      uint32_t weights[4], slopes[4];
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
              place > last.x ? 0 : exp2_approx(score[0] * lists.scale_log2 - lse.x * kLog2E);
          const float second =
              place > last.y ? 0 : exp2_approx(score[1] * lists.scale_log2 - lse.y * kLog2E);
          weights[2 * i + half] = pack<Element>(first, second);
          slopes[2 * i + half] =
              pack<Element>(first * (product[0] - delta.x), second * (product[1] - delta.y));
          // Keys that differ by 8 share the permutation of score_offset.
          *reinterpret_cast<uint32_t*>(
              shared + ((grad_scores + row / 16 * kScoreTileBytes + half * 8 * 32) ^ (i * 16))) =
              slopes[2 * i + half];
        }
      }
#pragma unroll
      for (int i = 0; i < kChannelSteps; ++i) {
        uint32_t rows[4];
        load_matrix_x4_transposed(rows, (grads_address + along + row * kRowBytes) ^ (i * 32));
        multiply_add<Element>(grad_value[2 * i], weights, rows[0], rows[1]);
        multiply_add<Element>(grad_value[2 * i + 1], weights, rows[2], rows[3]);
        load_matrix_x4_transposed(rows, (queries_address + along + row * kRowBytes) ^ (i * 32));
        multiply_add<Element>(grad_key[2 * i], slopes, rows[0], rows[1]);
        multiply_add<Element>(grad_key[2 * i + 1], slopes, rows[2], rows[3]);
      }
    }
  }

  const int turn = turn_of(schedule, tile);
  if (threadIdx.x == 0) await_turn(schedule.bucket_turn + tile.bucket, turn);
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = tile.first_key + warp * 16 + half * 8 + lane / 4;
    if (place >= tile.sequence.len_k) continue;
    const int64_t row =
        static_cast<int64_t>(tile.sequence.key_begin + place) * forward.num_kv_heads + tile.kv_head;
    const int64_t offset = row * Config::kHeadDim + lane % 4 * 2;
    add_row(schedule.grad_key + offset, grad_key, half, forward.softmax_scale);
    add_row(schedule.grad_value + offset, grad_value, half, 1.0f);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) pass_turn(schedule.bucket_turn + tile.bucket, turn);
}

}  // namespace msa::sm80
