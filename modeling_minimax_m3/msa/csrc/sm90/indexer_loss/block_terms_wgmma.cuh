// Teacher and student of gathered queries over one key block, KV-major, with wgmma.
//
// The plan of the mma kernel for 16 query heads per key/value head: a warp's 16 rows of a product
// are one pair, whose queries it holds in registers, and the scores of all 128 keys come from one
// chain of products. A warpgroup's warps wait for each other at the products only; the next
// queries are on their way while the scores become probabilities.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "config.h"
#include "sm90/ptx/wgmma.cuh"
#include "smxx/common/async_copy.cuh"
#include "smxx/common/matrix.cuh"
#include "smxx/indexer_loss/operands.cuh"
#include "smxx/indexer_loss/pairs.cuh"
#include "smxx/indexer_loss/student.cuh"
#include "smxx/indexer_loss/teacher.cuh"

namespace msa::sm90 {

template <typename Element, bool kGradient>
__global__ void __launch_bounds__(IndexerLossConfig::kThreads, 2)
    block_terms_kernel(const IndexerLossParams params, const IndexerLossSchedule schedule) {
  using Config = IndexerLossConfig;
  constexpr int kHeadDim = IndexerLossShape::kHeadDim;
  constexpr int kBlockSize = IndexerLossShape::kBlockSize;
  constexpr int kQHeadsPerKv = IndexerLossShape::kQHeadsPerKv;
  constexpr int kPanelBytes = kBlockSize * 128;
  constexpr int kKeyBytes = kBlockSize * kHeadDim * 2;
  constexpr int kRowFloats = Config::row_floats(kBlockSize);
  extern __shared__ __align__(1024) unsigned char shared[];
  const ForwardParams& attention = params.attention;
  const KvTile tile = find_tile(attention, schedule.lists, blockIdx.x);
  if (tile.num_queries == 0) return;

  const int warp = threadIdx.x / 32;
  unsigned char* index_keys = shared + kKeyBytes;
  float* probabilities =
      reinterpret_cast<float*>(index_keys + kKeyBytes) + warp * Config::kWarpPairs * kRowFloats;
  {
    const int64_t first = tile.sequence.key_begin + tile.first_key;
    const int num_keys = tile.sequence.len_k - tile.first_key;
    store_keys(shared,
               static_cast<const Element*>(attention.key) + first * attention.key_token_stride +
                   tile.kv_head * attention.key_head_stride,
               attention.key_token_stride, num_keys, kBlockSize, kHeadDim);
    store_keys(
        index_keys,
        static_cast<const Element*>(params.index_key) + first * params.index_key_token_stride,
        params.index_key_token_stride, num_keys, kBlockSize, kHeadDim);
  }
  fence_async_proxy();
  __syncthreads();

  const uint32_t keys_address = shared_address(shared);
  const uint32_t index_keys_address = keys_address + kKeyBytes;
  // The first pair of the warpgroup decides, so that its warps stay together.
  constexpr int kGroupPairs = 4 * Config::kWarpPairs;
  int group_first = warp / 4 * kGroupPairs;
  auto own_first = [&]() { return group_first + warp % 4 * Config::kWarpPairs; };
  auto own_pair = [&](int first) {
    return load_pair(schedule, tile, first + static_cast<int>(threadIdx.x) % 8);
  };
  int tokens = token_of(params, schedule, own_pair(own_first()));
  TeacherRows<kHeadDim> rows;
  load_teacher_rows<Element>(rows, attention, tokens, tile.kv_head, kQHeadsPerKv, 0);
  // What is loaded is used a step later at the earliest: the next pairs during the eight products,
  // the next queries during the sums, and during the last of them the index queries.
  IndexRow query;
  StudentPairs student;
  auto teach = [&](int i, auto is_last) {
    uint32_t a[kHeadDim / 16][4];
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      row_fragment(a[step], rows.low, rows.high, step);
    }
    const float offset[2] = {probability_offset(rows.lse[0], kQHeadsPerKv),
                             probability_offset(rows.lse[1], kQHeadsPerKv)};
    float scores[64];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      wgmma_m64n128k16<Element>(
          scores, a[step],
          swizzled_descriptor(keys_address + step / 4 * kPanelBytes + step % 4 * 32), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    accumulators_ready(scores);
#pragma unroll
    for (int key = 0; key < kBlockSize; key += 32) {
      store_probabilities<kQHeadsPerKv>(probabilities + key, kRowFloats,
                                        *reinterpret_cast<const float (*)[16]>(scores + key / 2),
                                        schedule.lists.scale_log2, offset, i);
      // Registers for the next queries are free when some scores are done with.
      if (key != 0) continue;
      if constexpr (decltype(is_last)::value) {
        load_index_query<Element>(query, params, tokens, tile.kv_head, kHeadDim);
        load_student_pairs<kGradient>(student, params, schedule, tile, own_first(), tokens);
      } else {
        load_teacher_rows<Element>(rows, attention, tokens, tile.kv_head, kQHeadsPerKv, i + 1);
      }
    }
  };
  while (group_first < tile.num_queries) {
    const int next_pair = own_pair(own_first() + Config::kPassPairs);
#pragma unroll 1
    for (int i = 0; i + 1 < Config::kWarpPairs; ++i) teach(i, std::false_type{});
    teach(Config::kWarpPairs - 1, std::true_type{});
    __syncwarp();  // the probabilities of all eight pairs are there

    const int next_tokens = token_of(params, schedule, next_pair);
    load_teacher_rows<Element>(rows, attention, next_tokens, tile.kv_head, kQHeadsPerKv, 0);
    IndexScores scores;
    index_scores<Element>(scores, query, index_keys_address, tile, tokens,
                          schedule.index_scale_log2, kBlockSize, kHeadDim);
    store_student<Element, kGradient>(schedule, tile, own_first(), student, scores, probabilities,
                                      kBlockSize);
    tokens = next_tokens;
    group_first += Config::kPassPairs;
    __syncwarp();  // they are read
  }
}

}  // namespace msa::sm90
