// Attention of one (row, token, key/value head) over 64 of its selected keys: a group of 16 a warp.
//
// For few items, where every step counts. The 64 keys lie in one block, so that one id leads to
// all of them, and every thread finds its addresses itself. A warp scores its own 16 keys, but
// multiplies a quarter of the columns of all 64 values: what the warps exchange is the weights,
// not the outputs. Nothing waits for another warp before that, and no instruction runs twice.
// Products and sums are those of split_attention_kernel, in the same order.
#pragma once

#include <cstdint>

#include "item_attention.cuh"
#include "params.h"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"
#include "smxx/common/quads.cuh"
#include "smxx/decode/cache_rows.cuh"
#include "smxx/decode/config.h"
#include "smxx/decode/partial_results.cuh"

namespace msa::sm80 {

template <int kHeadDim>
struct OneGroupShared {
  uint4 queries[kHeadDim / 16][32];               // a operands, one a k step and lane
  uint4 weights[kAttentionWarps][32];             // a operands: a warp's 16 keys
  float4 sums[kAttentionWarps][kMaxQHeadsPerKv];  // of weights; shares of four lanes
  float4 maxima[kMaxQHeadsPerKv];                 // one a warp
};

// Loads a few columns that are read only once, bypassing L1.
__device__ __forceinline__ void load_streamed(uint32_t (&data)[2], const void* source) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];\n"
               : "=r"(data[0]), "=r"(data[1])
               : "l"(source));
}

__device__ __forceinline__ void load_streamed(uint32_t (&data)[1], const void* source) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.u32 %0, [%1];\n" : "=r"(data[0]) : "l"(source));
}

// `count` rows on. In assembly, because the compiler would otherwise multiply sums of counts in 64
// bits.
__device__ __forceinline__ const char* advance(const char* base, int count, int stride) {
  const char* result;
  asm("mad.wide.s32 %0, %1, %2, %3;\n" : "=l"(result) : "r"(count), "r"(stride), "l"(base));
  return result;
}

__device__ __forceinline__ void store_columns(float* target, const float (&data)[4]) {
  *reinterpret_cast<float4*>(target) = {data[0], data[1], data[2], data[3]};
}

__device__ __forceinline__ void store_columns(float* target, const float (&data)[2]) {
  *reinterpret_cast<float2*>(target) = {data[0], data[1]};
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionCtasPerSm)
    one_group_attention_kernel(const DecodeAttentionParams params, int q_heads_per_kv) {
  constexpr int kKeyChunks = kHeadDim / 32;  // of 32 channels, 8 a lane
  constexpr int kWarpColumns = kHeadDim / kAttentionWarps;
  constexpr int kLaneColumns = kWarpColumns / 8;
  constexpr int kWords = kLaneColumns / 2;
  constexpr int kKeys = kAttentionWarps * kGroupKeys;
  static_assert(kKeys == 64, "the smallest block");
  __shared__ OneGroupShared<kHeadDim> shared;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group_row = lane / 4, part = lane % 4;
  const AttentionItem item(params);
  const int shift_of_block = block_shift(params.block_size);
  const int shift_of_parts = shift_of_block - 6;  // 64 keys each
  const int32_t* block_id =
      params.block_indices + item.number * params.topk + (item.split >> shift_of_parts);
  const int first_of_block = (item.split & ((1 << shift_of_parts) - 1)) * kKeys;
  const Element* query = item.query<Element>(params, q_heads_per_kv, part);
  // In bytes; they fit 32 bits, as the launch checks.
  const int key_stride = static_cast<int>(params.key_slot_stride) * 2;
  const int value_stride = static_cast<int>(params.value_slot_stride) * 2;
  const char* key_base =
      reinterpret_cast<const char*>(static_cast<const Element*>(params.key_cache) +
                                    item.kv_head * params.key_head_stride + 8 * part);
  // Column n of the mma is the lane's n-th run of columns, in an order in which stores are whole
  // sectors.
  const int run = group_row / 2 + 4 * (group_row % 2);
  const char* value_base = reinterpret_cast<const char*>(
      static_cast<const Element*>(params.value_cache) + item.kv_head * params.value_head_stride +
      warp * kWarpColumns + run * kLaneColumns);
  // The workspace fits 32 bits here, as the launch checks.
  const PartialResults partial = partial_results(params, item.splits);
  const auto index_of_head = [&](int head) {
    return static_cast<int>(
        partial_index(item.number, item.split, head, item.splits, q_heads_per_kv));
  };
  prefetch_queries<kHeadDim>(query, params.query_head_stride, q_heads_per_kv, part);
  wait_for_previous_kernel(params.cache.cache_seqlens + item.batch_row, block_id, query, key_base,
                           value_base);

  const int block = *block_id;
  const CacheRow row = load_cache_row(params.cache, item.batch_row);
  QueryShare<kHeadDim> query_share;
  query_share.load(query, params.query_head_stride, q_heads_per_kv, warp, group_row);

  // Of query heads group_row and group_row + 8, and columns of runs part and part + 4.
  float result[2][2][kLaneColumns] = {};
  float best[2] = {-INFINITY, -INFINITY}, total = 0.0f;
  const int position = row.length - params.num_new + item.token;
  const int key = (block << shift_of_block) + first_of_block;
  if (block >= 0 && block <= position >> shift_of_block && key <= position) {
    const int last = min(position - key, kKeys - 1);  // attended key
    const int first_key = warp * kGroupKeys;          // of this warp

    // Where the groups are, up to that of the last key.
    int page[kAttentionWarps], slot[kAttentionWarps];
    const int first_slot = row.leftpad + key;
    if (params.cache.block_table == nullptr) {
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w) {
        page[w] = item.batch_row;
        slot[w] = first_slot + w * kGroupKeys;
      }
    } else {
      int entry = first_slot / params.cache.page_size;
      int next_slot = first_slot - entry * params.cache.page_size;
      const int32_t* table =
          params.cache.block_table + item.batch_row * params.cache.block_table_stride;
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w) {
        page[w] = 0;
        if (w == 0 || w * kGroupKeys <= last) {
          page[w] = min(max(table[entry], 0), params.cache.num_pages - 1);
        }
        slot[w] = next_slot;
        next_slot += kGroupKeys;
        if (next_slot == params.cache.page_size) {
          next_slot = 0;
          ++entry;
        }
      }
    }
    // Lanes past the last attended key reread that key, and warps past its group reread that group.
    // Their weights are 0.
    const int key_group = min(warp, last / kGroupKeys);
    int key_page = page[0], key_slot = slot[0];
#pragma unroll
    for (int w = 1; w < kAttentionWarps; ++w) {
      if (w == key_group) {
        key_page = page[w];
        key_slot = slot[w];
      }
    }
    uint4 keys[2][kKeyChunks];  // keys group_row and group_row + 8
    const char* base_of_keys =
        advance(key_base + key_page * params.key_row_stride * 2, key_slot, key_stride);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int of_group = min(group_row + 8 * tile, last - key_group * kGroupKeys);
      const char* source = advance(base_of_keys, of_group, key_stride);
#pragma unroll
      for (int j = 0; j < kKeyChunks; ++j) keys[tile][j] = load_streamed_16(source + 64 * j);
    }
    // Of a group's keys 2 part, 2 part + 1, 2 part + 8, 2 part + 9.
    uint32_t values[kAttentionWarps][4][kWords] = {};
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      if (w == 0 || w * kGroupKeys <= last) {
        const char* base =
            advance(value_base + page[w] * params.value_row_stride * 2, slot[w], value_stride);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int of_group = min(2 * part + k % 2 + 8 * (k / 2), last - w * kGroupKeys);
          load_streamed(values[w][k], advance(base, of_group, value_stride));
        }
      }
    }
    // The barrier costs nothing while the loads are under way, and keeps the compiler from
    // multiplying keys before it has requested the values.
    query_share.store(shared.queries, warp, lane);
    __syncthreads();

    float score[2][4] = {};
    multiply_keys<Element, kHeadDim>(score, shared.queries, keys, lane);
    scale_scores(score, best, params.softmax_scale * kLog2E, part, first_key, last);
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      best[head] = quad_max(best[head]);
      if (part == 0) {
        reinterpret_cast<float*>(&shared.maxima[group_row + 8 * head])[warp] = best[head];
      }
    }
    float sum[2] = {0.0f, 0.0f};
    weigh_scores(score, sum, best, part, first_key, last);
    shared.weights[warp][lane] = {
        pack<Element>(score[0][0], score[0][1]), pack<Element>(score[0][2], score[0][3]),
        pack<Element>(score[1][0], score[1][1]), pack<Element>(score[1][2], score[1][3])};
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      reinterpret_cast<float*>(&shared.sums[warp][group_row + 8 * head])[part] = sum[head];
    }
    __syncthreads();

    float factor[2][kAttentionWarps];
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      const float4 of_warps = shared.maxima[group_row + 8 * head];
      const float maxima[kAttentionWarps] = {of_warps.x, of_warps.y, of_warps.z, of_warps.w};
      best[head] = fmaxf(fmaxf(maxima[0], maxima[1]), fmaxf(maxima[2], maxima[3]));
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w) {
        factor[head][w] = maxima[w] == -INFINITY ? 0.0f : exp2_approx(maxima[w] - best[head]);
      }
    }
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const uint4 a = shared.weights[w][lane];
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        const uint32_t select = i % 2 == 0 ? 0x5410 : 0x7632;
        float term[4] = {};
        multiply_add<Element>(term, {a.x, a.y, a.z, a.w},
                              __byte_perm(values[w][0][i / 2], values[w][1][i / 2], select),
                              __byte_perm(values[w][2][i / 2], values[w][3][i / 2], select));
#pragma unroll
        for (int k = 0; k < 4; ++k) result[k / 2][k % 2][i] += factor[k / 2][w] * term[k];
      }
    }
    if (warp == 0 && part < 2) {
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w) {
        const float4 sums = shared.sums[w][group_row + 8 * part];
        total +=
            (part == 0 ? factor[0][w] : factor[1][w]) * ((sums.x + sums.y) + (sums.z + sums.w));
      }
    }
  }

  const int first_column = warp * kWarpColumns + part * kLaneColumns;
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    const int head_row = group_row + 8 * head;
    if (head_row >= q_heads_per_kv) continue;
    float* out = partial.outputs + (index_of_head(head_row) * kHeadDim + first_column);
    store_columns(out, result[head][0]);
    store_columns(out + 4 * kLaneColumns, result[head][1]);
  }
  if (warp == 0 && part < 2 && group_row + 8 * part < q_heads_per_kv) {
    partial.softmax[index_of_head(group_row + 8 * part)] = {part == 0 ? best[0] : best[1], total};
  }
}

}  // namespace msa::sm80
