// Attention of one (row, token, key/value head) over 64 of its selected keys: a group of 16 a warp.
//
// For few items, where every step counts. The 64 keys lie in one block, so that one id leads to
// all of them, and every thread finds its addresses itself. A warp scores its own 16 keys, but
// multiplies a quarter of the columns of all 64 values: what the warps exchange is the weights,
// not the outputs. Nothing waits for another warp before that, and no instruction runs twice.
// Products and sums are those of split_attention_kernel, in the same order.
#pragma once

#include <cstdint>

#include "params.h"
#include "smxx/common/dependent_launch.cuh"
#include "smxx/common/logarithms.h"
#include "smxx/common/matrix.cuh"
#include "smxx/decode/cache_rows.cuh"
#include "smxx/decode/config.h"
#include "smxx/decode/partial_results.cuh"

namespace msa::sm80 {

template <int kHeadDim>
struct OneGroupShared {
  uint4 queries[kHeadDim / 16][32];         // a operands, one a k step and lane
  uint4 weights[kAttentionWarps][32];       // a operands: a warp's 16 keys
  float4 sums[kAttentionWarps][kMaxGroup];  // of weights; shares of four lanes
  float4 maxima[kMaxGroup];                 // one a warp
};

// The words of a few columns that this kernel reads once.
__device__ __forceinline__ void load_streamed(uint32_t (&data)[2], const void* source) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];\n"
               : "=r"(data[0]), "=r"(data[1])
               : "l"(source));
}

__device__ __forceinline__ void load_streamed(uint32_t (&data)[1], const void* source) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.u32 %0, [%1];\n" : "=r"(data[0]) : "l"(source));
}

// `count` rows on. Opaque, or the compiler multiplies sums of counts in 64 bits.
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
    one_group_attention_kernel(const DecodeAttentionParams params, int num_group_heads) {
  constexpr int kKeyChunks = kHeadDim / 32;  // of 32 channels, 8 a lane
  constexpr int kWarpColumns = kHeadDim / kAttentionWarps;
  constexpr int kLaneColumns = kWarpColumns / 8;
  constexpr int kWords = kLaneColumns / 2;
  constexpr int kKeys = kAttentionWarps * kGroupKeys;
  static_assert(kKeys == 64, "the smallest block");
  __shared__ OneGroupShared<kHeadDim> shared;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group_row = lane / 4, part = lane % 4;
  const int token_row = blockIdx.x, kv_head = blockIdx.y, split = blockIdx.z;
  const int splits = gridDim.z;
  const int batch_row = params.num_new == 1 ? token_row : token_row / params.num_new;
  const int token = token_row - batch_row * params.num_new;
  const int64_t item = int64_t{token_row} * params.num_kv_heads + kv_head;
  const int shift_of_block = block_shift(params.block_size);
  const int shift_of_parts = shift_of_block - 6;  // 64 keys each
  const int32_t* block_id = params.block_indices + item * params.topk + (split >> shift_of_parts);
  const int first_of_block = (split & ((1 << shift_of_parts) - 1)) * kKeys;
  const Element* query = static_cast<const Element*>(params.query) +
                         batch_row * params.query_batch_stride + token * params.query_token_stride +
                         int64_t{kv_head} * num_group_heads * params.query_head_stride + 8 * part;
  // In bytes; they fit 32 bits, as the launch checks.
  const int key_stride = static_cast<int>(params.key_slot_stride) * 2;
  const int value_stride = static_cast<int>(params.value_slot_stride) * 2;
  const char* key_base = reinterpret_cast<const char*>(
      static_cast<const Element*>(params.key_cache) + kv_head * params.key_head_stride + 8 * part);
  // Column n of the mma is the lane's n-th run of columns, in an order in which stores are whole
  // sectors.
  const int run = group_row / 2 + 4 * (group_row % 2);
  const char* value_base = reinterpret_cast<const char*>(
      static_cast<const Element*>(params.value_cache) + kv_head * params.value_head_stride +
      warp * kWarpColumns + run * kLaneColumns);
  // The workspace fits 32 bits here, as the launch checks.
  const PartialResults partial = partial_results(params, splits);
  const auto index_of_head = [&](int head) {
    return static_cast<int>(partial_index(item, split, head, splits, num_group_heads));
  };
  constexpr int kLinesPerHead = kHeadDim / 64;
  if (threadIdx.x < num_group_heads * kLinesPerHead) {
    prefetch_line(query - 8 * part + threadIdx.x / kLinesPerHead * params.query_head_stride +
                  threadIdx.x % kLinesPerHead * 64);
  }
  wait_for_previous_kernel(params.cache.cache_seqlens + batch_row, block_id, query, key_base,
                           value_base);

  const int block = *block_id;
  const CacheRow row = load_cache_row(params.cache, batch_row);
  constexpr int kQuerySteps = kHeadDim / 16 / kAttentionWarps;
  uint2 query_parts[kQuerySteps][2] = {};
#pragma unroll
  for (int i = 0; i < kQuerySteps; ++i) {
    const int step = warp + i * kAttentionWarps;
    const int channel = step / 2 * 32 + 4 * (step % 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = group_row + 8 * half;
      if (head < num_group_heads) {
        query_parts[i][half] =
            *reinterpret_cast<const uint2*>(query + head * params.query_head_stride + channel);
      }
    }
  }

  // Of query heads group_row and group_row + 8, and columns of runs part and part + 4.
  float result[2][2][kLaneColumns] = {};
  float best[2] = {-INFINITY, -INFINITY}, total = 0.0f;
  const int position = row.length - params.num_new + token;
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
        page[w] = batch_row;
        slot[w] = first_slot + w * kGroupKeys;
      }
    } else {
      int entry = first_slot / params.cache.page_size;
      int next_slot = first_slot - entry * params.cache.page_size;
      const int32_t* table = params.cache.block_table + batch_row * params.cache.block_table_stride;
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
    // Keys after the last attended one reread that one. A warp past it reads the last group, whose
    // values are zeros. All their weights are zero.
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
#pragma unroll
    for (int i = 0; i < kQuerySteps; ++i) {
      shared.queries[warp + i * kAttentionWarps][lane] = {query_parts[i][0].x, query_parts[i][1].x,
                                                          query_parts[i][0].y, query_parts[i][1].y};
    }
    __syncthreads();

    float score[2][4] = {};
#pragma unroll
    for (int j = 0; j < kKeyChunks; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 a = shared.queries[2 * j + half][lane];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const uint4 b = keys[tile][j];
          multiply_add<Element>(score[tile], {a.x, a.y, a.z, a.w}, half == 0 ? b.x : b.z,
                                half == 0 ? b.y : b.w);
        }
      }
    }
    const float scale = params.softmax_scale * kLog2E;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool attended = first_key + 8 * tile + 2 * part + k % 2 <= last;
        score[tile][k] = attended ? score[tile][k] * scale : -INFINITY;
        best[k / 2] = fmaxf(best[k / 2], score[tile][k]);
      }
    }
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      best[head] = fmaxf(best[head], __shfl_xor_sync(0xffffffffu, best[head], 1));
      best[head] = fmaxf(best[head], __shfl_xor_sync(0xffffffffu, best[head], 2));
      if (part == 0) {
        reinterpret_cast<float*>(&shared.maxima[group_row + 8 * head])[warp] = best[head];
      }
    }
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool attended = first_key + 8 * tile + 2 * part + k % 2 <= last;
        score[tile][k] = attended ? exp2_approx(score[tile][k] - best[k / 2]) : 0.0f;
        sum[k / 2] += score[tile][k];
      }
    }
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
    if (head_row >= num_group_heads) continue;
    float* out = partial.outputs + (index_of_head(head_row) * kHeadDim + first_column);
    store_columns(out, result[head][0]);
    store_columns(out + 4 * kLaneColumns, result[head][1]);
  }
  if (warp == 0 && part < 2 && group_row + 8 * part < num_group_heads) {
    partial.softmax[index_of_head(group_row + 8 * part)] = {part == 0 ? best[0] : best[1], total};
  }
}

}  // namespace msa::sm80
