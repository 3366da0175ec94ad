// The gradient of the index queries: sums over the places of a query's list.
#pragma once

#include <cuda_runtime.h>

#include "config.h"
#include "schedule.h"
#include "smxx/common/matrix.cuh"
#include "smxx/forward_kv_major/buckets.cuh"

namespace msa {

// grad_index_query from the partial sums of the places, in their order. One warp per (query token,
// head), 4 or 2 channels a lane.
template <typename Element, int kIndexDim>
__global__ void __launch_bounds__(32 * kCombineRowWarps)
    combine_index_query_kernel(const IndexerLossParams params, const IndexerLossSchedule schedule) {
  constexpr int kLaneChannels = kIndexDim / 32;
  const ForwardParams& attention = params.attention;
  const KvSchedule& lists = schedule.lists;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineRowWarps + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(lists.token_end - lists.token_begin) * attention.num_kv_heads) {
    return;
  }
  float sums[kLaneChannels] = {};
  for (int base = 0; base < attention.topk; base += 32) {
    const int64_t pair = row * attention.topk + base;
    const bool is_written =
        base + lane < attention.topk && bucket_of_pair(attention, lists, pair + lane) >= 0;
    uint32_t written = __ballot_sync(0xffffffffu, is_written);
    const float* source = schedule.partial_index_query + pair * kIndexDim + lane * kLaneChannels;
    while (written != 0) {
      constexpr int kAtOnce = 4;  // loads in flight
      float values[kAtOnce][kLaneChannels] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (written == 0) break;
        const float* place = source + (__ffs(written) - 1) * kIndexDim;
        written &= written - 1;
        if constexpr (kLaneChannels == 4) {
          *reinterpret_cast<float4*>(values[i]) = __ldcs(reinterpret_cast<const float4*>(place));
        } else {
          *reinterpret_cast<float2*>(values[i]) = __ldcs(reinterpret_cast<const float2*>(place));
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < kLaneChannels; ++j) sums[j] += values[i][j];
      }
    }
  }
  const float factor = schedule.factors[1];
  auto* target =
      reinterpret_cast<uint32_t*>(params.grad_index_query) +
      ((static_cast<int64_t>(lists.token_begin) * attention.num_kv_heads + row) * kIndexDim) / 2 +
      lane * (kLaneChannels / 2);
#pragma unroll
  for (int j = 0; j < kLaneChannels; j += 2) {
    target[j / 2] = pack<Element>(sums[j] * factor, sums[j + 1] * factor);
  }
}

}  // namespace msa
