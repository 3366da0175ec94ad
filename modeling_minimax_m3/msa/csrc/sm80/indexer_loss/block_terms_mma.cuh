// Teacher and student of gathered queries over one key block, KV-major.
//
// A thread block stores the keys and index keys of one block and takes up to 512 of its pairs
// through them, eight a warp, which share nothing else. The heads' scores become the teacher's
// probabilities 32 keys at a time: exponentials, then a sum over the rows of a pair, which leaves
// them in shared memory in float32, where the student meets them.
#pragma once

#include <cuda_runtime.h>

#include "smxx/common/async_copy.cuh"
#include "smxx/common/matrix.cuh"
#include "smxx/indexer_loss/operands.cuh"
#include "smxx/indexer_loss/pairs.cuh"
#include "smxx/indexer_loss/student.cuh"
#include "smxx/indexer_loss/teacher.cuh"

namespace msa::sm80 {

template <typename Element, int kHeadDim>
__device__ __forceinline__ void teacher_scores(float (&scores)[16],
                                               const TeacherRows<kHeadDim>& rows,
                                               uint32_t keys_address, int panel_bytes) {
#pragma unroll
  for (int i = 0; i < 16; ++i) scores[i] = 0;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[4];
    row_fragment(a, rows.low, rows.high, step);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t b[4];
      load_matrix_x4(b, (keys_address + step / 4 * panel_bytes + n * 2048) ^ (step % 4 * 32));
      multiply_add<Element>(*reinterpret_cast<float (*)[4]>(scores + n * 8), a, b[0], b[1]);
      multiply_add<Element>(*reinterpret_cast<float (*)[4]>(scores + n * 8 + 4), a, b[2], b[3]);
    }
  }
}

template <typename Element, int kHeadDim, bool kGradient>
__global__ void __launch_bounds__(IndexerLossConfig::kThreads, 2)
    block_terms_kernel(const IndexerLossParams params, const IndexerLossSchedule schedule) {
  using Config = IndexerLossConfig;
  extern __shared__ __align__(1024) unsigned char shared[];
  const ForwardParams& attention = params.attention;
  const KvTile tile = find_tile(attention, schedule.lists, blockIdx.x);
  if (tile.num_queries == 0) return;

  const int block_size = attention.block_size;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  unsigned char* index_keys = shared + block_size * kHeadDim * 2;
  float* probabilities = reinterpret_cast<float*>(index_keys + block_size * params.index_dim * 2) +
                         warp * Config::kWarpPairs * Config::row_floats(block_size);
  {
    const int64_t first = tile.sequence.key_begin + tile.first_key;
    const int num_keys = tile.sequence.len_k - tile.first_key;
    store_keys(shared,
               static_cast<const Element*>(attention.key) + first * attention.key_token_stride +
                   tile.kv_head * attention.key_head_stride,
               attention.key_token_stride, num_keys, block_size, kHeadDim);
    store_keys(
        index_keys,
        static_cast<const Element*>(params.index_key) + first * params.index_key_token_stride,
        params.index_key_token_stride, num_keys, block_size, params.index_dim);
  }
  __syncthreads();

  const int q_heads_per_kv = attention.num_heads / attention.num_kv_heads;
  const int row_tiles = (Config::kWarpPairs * q_heads_per_kv + 15) / 16;
  const uint32_t keys_address =
      shared_address(shared) + swizzled_offset<8>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  const uint32_t index_keys_address = shared_address(index_keys);
  for (int first = warp * Config::kWarpPairs; first < tile.num_queries;
       first += Config::kPassPairs) {
    const int tokens = token_of(params, schedule, load_pair(schedule, tile, first + lane % 8));
#pragma unroll 1
    for (int i = 0; i < row_tiles; ++i) {
      TeacherRows<kHeadDim> rows;
      load_teacher_rows<Element>(rows, attention, tokens, tile.kv_head, q_heads_per_kv, i);
      const float offset[2] = {probability_offset(rows.lse[0], q_heads_per_kv),
                               probability_offset(rows.lse[1], q_heads_per_kv)};
#pragma unroll 1
      for (int key = 0; key < block_size; key += 32) {
        float scores[16];
        teacher_scores<Element>(scores, rows, keys_address + key * 128, block_size * 128);
        auto store = [&](auto heads) {
          store_probabilities<decltype(heads)::value>(probabilities + key,
                                                      Config::row_floats(block_size), scores,
                                                      schedule.lists.scale_log2, offset, i);
        };
        switch (q_heads_per_kv) {
          case 1:
            store(std::integral_constant<int, 1>{});
            break;
          case 2:
            store(std::integral_constant<int, 2>{});
            break;
          case 4:
            store(std::integral_constant<int, 4>{});
            break;
          case 8:
            store(std::integral_constant<int, 8>{});
            break;
          default:
            store(std::integral_constant<int, 16>{});
        }
      }
    }
    __syncwarp();  // the probabilities of all eight pairs are there

    IndexRow query;
    load_index_query<Element>(query, params, tokens, tile.kv_head, params.index_dim);
    IndexScores scores;
    index_scores<Element>(scores, query, index_keys_address, tile, tokens,
                          schedule.index_scale_log2, block_size, params.index_dim);
    StudentPairs student;
    load_student_pairs<kGradient>(student, params, schedule, tile, first, tokens);
    store_student<Element, kGradient>(schedule, tile, first, student, scores, probabilities,
                                      block_size);
    __syncwarp();  // they are read
  }
}

}  // namespace msa::sm80
