// Attention of one (row, token, key/value head) over a share of its selected blocks.
//
// The G query heads of the key/value head are the m operand of the mma (padded to 16). Keys and
// values go from global memory to registers directly, 16 bytes a lane, in the order in which the
// mma wants them: the order of channels in a dot product, and of columns in the output, is free.
// Each of the four warps takes 16 keys at a time and keeps its own running softmax; they are merged
// once at the end. Shared memory holds only the queries and where each group of keys lies.
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

// 16 keys that a warp takes at a time: all of them on one page.
struct alignas(16) KeyGroupPlace {
  int page;  // or batch row of a contiguous cache; -1: no key of the group is attended to
  int slot;  // within the page
  int last;  // the last attended key of the group, 0 to 15
};

template <int kHeadDim>
struct AttentionShared {
  uint4 queries[kHeadDim / 16][32];  // a operands, one a k step and lane
  KeyGroupPlace places[kMaxGroupsPerCta];
  float2 softmax[kAttentionWarps][kMaxQHeadsPerKv];
  float4 outputs[kAttentionWarps][kMaxQHeadsPerKv][kHeadDim / 4 + 1];  // + 1: see spread_column
};

// Where four columns of an output row lie in shared memory: with rows of an odd number of float4,
// the eight lanes that write together (two rows, four parts) meet no bank twice.
__device__ __forceinline__ int spread_column(int column) {
  return column ^ (column >> 2 & 2);
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionCtasPerSm)
    split_attention_kernel(const DecodeAttentionParams params, int groups_per_split,
                           int q_heads_per_kv) {
  constexpr int kKeyChunks = kHeadDim / 32;    // of 32 channels, 8 a lane
  constexpr int kValueChunks = kHeadDim / 64;  // of 64 channels, 8 a lane
  __shared__ AttentionShared<kHeadDim> shared;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group_row = lane / 4, part = lane % 4;
  const AttentionItem item(params);
  const int shift_of_block = block_shift(params.block_size);
  const int shift_of_groups = shift_of_block - 4;  // 16 keys a group
  const int first_group = item.split * groups_per_split;
  const int num_groups = min(groups_per_split, (params.topk << shift_of_groups) - first_group);
  const int32_t* blocks = params.block_indices + item.number * params.topk;
  const Element* query = item.query<Element>(params, q_heads_per_kv, part);
  // Slot strides fit 32 bits also times 16, which the launch checks.
  const int key_stride = static_cast<int>(params.key_slot_stride);
  const int value_stride = static_cast<int>(params.value_slot_stride);
  const Element* key_base = static_cast<const Element*>(params.key_cache) +
                            item.kv_head * params.key_head_stride + 8 * part;
  const Element* value_base = static_cast<const Element*>(params.value_cache) +
                              item.kv_head * params.value_head_stride + 8 * group_row;
  prefetch_queries<kHeadDim>(query, params.query_head_stride, q_heads_per_kv, part);
  wait_for_previous_kernel(params.cache.cache_seqlens + item.batch_row, blocks, query, key_base,
                           value_base);

  // Block ids and queries are requested first, because no length has to be known for them.
  const auto load_block = [&](int i) {
    return i < num_groups ? blocks[(first_group + i) >> shift_of_groups] : -1;
  };
  int block = load_block(threadIdx.x);
  QueryShare<kHeadDim> query_share;
  query_share.load(query, params.query_head_stride, q_heads_per_kv, warp, group_row);

  // Where this CTA's keys are.
  const CacheRow row = load_cache_row(params.cache, item.batch_row);
  const int position = row.length - params.num_new + item.token;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_groups; i += kAttentionThreads) {
    KeyGroupPlace place{-1, 0, 0};
    if (block >= 0 && position >= 0 && block <= position >> shift_of_block) {
      const int key = (block << shift_of_block) +
                      ((first_group + i) & ((1 << shift_of_groups) - 1)) * kGroupKeys;
      if (key <= position) {
        const int slot = row.leftpad + key;
        place = {load_page(params.cache, item.batch_row, slot), slot_in_page(params.cache, slot),
                 min(position - key, kGroupKeys - 1)};
      }
    }
    shared.places[i] = place;
    block = load_block(i + kAttentionThreads);
  }
  query_share.store(shared.queries, warp, lane);
  __syncthreads();

  uint4 keys[2][kKeyChunks];      // keys group_row and group_row + 8
  uint4 values[4][kValueChunks];  // keys 2 part, 2 part + 1, 2 part + 8, 2 part + 9

  const auto next_group = [&](int i) {
    while (i < num_groups && shared.places[i].page < 0) i += kAttentionWarps;
    return i;
  };
  // Keys after the last attended one reread that one; their weights are zero.
  const auto load_keys = [&](const KeyGroupPlace& place) {
    const Element* base =
        key_base + place.page * params.key_row_stride + int64_t{place.slot} * key_stride;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const Element* source = base + min(group_row + 8 * tile, place.last) * key_stride;
#pragma unroll
      for (int j = 0; j < kKeyChunks; ++j) keys[tile][j] = load_streamed_16(source + 32 * j);
    }
  };
  const auto load_values = [&](const KeyGroupPlace& place) {
    const Element* base =
        value_base + place.page * params.value_row_stride + int64_t{place.slot} * value_stride;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Element* source = base + min(2 * part + k % 2 + 8 * (k / 2), place.last) * value_stride;
#pragma unroll
      for (int j = 0; j < kValueChunks; ++j) values[k][j] = load_streamed_16(source + 64 * j);
    }
  };

  // Of query heads group_row and group_row + 8; sums are this lane's share.
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  // [j][i]: columns 64 j + 16 part + i (heads' first and third element) and + 8 (the others).
  float output[kValueChunks][8][4] = {};
  const float scale = params.softmax_scale * kLog2E;

  int current = next_group(warp);
  if (current < num_groups) {
    load_keys(shared.places[current]);
    load_values(shared.places[current]);
  }
  while (current < num_groups) {
    const int last = shared.places[current].last;
    float score[2][4] = {};
    multiply_keys<Element, kHeadDim>(score, shared.queries, keys, lane);
    const int next = next_group(current + kAttentionWarps);
    if (next < num_groups) load_keys(shared.places[next]);

    float best[2] = {maximum[0], maximum[1]};
    scale_scores(score, best, scale, part, 0, last);
    best[0] = quad_max(best[0]);
    best[1] = quad_max(best[1]);
    // The first group has nothing to rescale: its maximum of -inf only needs replacing.
    const bool first = maximum[0] == -INFINITY && maximum[1] == -INFINITY;
    if (__all_sync(0xffffffffu, first)) {
      maximum[0] = best[0];
      maximum[1] = best[1];
    } else if (__any_sync(0xffffffffu, best[0] > maximum[0] || best[1] > maximum[1])) {
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        const float factor =
            best[head] > maximum[head] ? exp2_approx(maximum[head] - best[head]) : 1.0f;
        maximum[head] = best[head];
        sum[head] *= factor;
#pragma unroll
        for (int j = 0; j < kValueChunks; ++j) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            output[j][i][2 * head] *= factor;
            output[j][i][2 * head + 1] *= factor;
          }
        }
      }
    }
    weigh_scores(score, sum, maximum, part, 0, last);
    const uint32_t weights[4] = {
        pack<Element>(score[0][0], score[0][1]), pack<Element>(score[0][2], score[0][3]),
        pack<Element>(score[1][0], score[1][1]), pack<Element>(score[1][2], score[1][3])};
#pragma unroll
    for (int j = 0; j < kValueChunks; ++j) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        uint32_t v[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          v[k] = word == 0   ? values[k][j].x
                 : word == 1 ? values[k][j].y
                 : word == 2 ? values[k][j].z
                             : values[k][j].w;
        }
        multiply_add<Element>(output[j][2 * word], weights, __byte_perm(v[0], v[1], 0x5410),
                              __byte_perm(v[2], v[3], 0x5410));
        multiply_add<Element>(output[j][2 * word + 1], weights, __byte_perm(v[0], v[1], 0x7632),
                              __byte_perm(v[2], v[3], 0x7632));
      }
    }
    if (next < num_groups) load_values(shared.places[next]);
    current = next;
  }

  // Merge the warps.
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    sum[head] = quad_sum(sum[head]);
    const int head_row = group_row + 8 * head;
    if (part == 0) shared.softmax[warp][head_row] = {maximum[head], sum[head]};
#pragma unroll
    for (int j = 0; j < kValueChunks; ++j) {
#pragma unroll
      for (int quad = 0; quad < 4; ++quad) {
        const int element = 2 * head + quad / 2, i = quad % 2 * 4;
        shared.outputs[warp][head_row][spread_column(16 * j + 4 * part + quad)] = {
            output[j][i][element], output[j][i + 1][element], output[j][i + 2][element],
            output[j][i + 3][element]};
      }
    }
  }
  __syncthreads();
  const PartialResults partial = partial_results(params, item.splits);
#pragma unroll 1
  for (int index = threadIdx.x; index < q_heads_per_kv * kHeadDim / 4; index += kAttentionThreads) {
    const int head = index / (kHeadDim / 4), column = index % (kHeadDim / 4);
    float best = -INFINITY;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) best = fmaxf(best, shared.softmax[w][head].x);
    float total = 0.0f;
    float4 result{};
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float2 softmax = shared.softmax[w][head];
      const float factor = softmax.x == -INFINITY ? 0.0f : exp2_approx(softmax.x - best);
      const float4 term = shared.outputs[w][head][spread_column(column)];
      total += factor * softmax.y;
      result.x += factor * term.x;
      result.y += factor * term.y;
      result.z += factor * term.z;
      result.w += factor * term.w;
    }
    if (item.splits > 1) {
      const int64_t index_of_partial =
          partial_index(item.number, item.split, head, item.splits, q_heads_per_kv);
      *reinterpret_cast<float4*>(partial.outputs + index_of_partial * kHeadDim + 4 * column) =
          result;
      if (column == 0) partial.softmax[index_of_partial] = {best, total};
    } else {
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
      const int64_t head_index = item.number * q_heads_per_kv + head;
      *reinterpret_cast<uint2*>(static_cast<Element*>(params.out) + head_index * kHeadDim +
                                4 * column) = {
          pack<Element>(result.x * inverse, result.y * inverse),
          pack<Element>(result.z * inverse, result.w * inverse)};
    }
  }
}

}  // namespace msa::sm80
