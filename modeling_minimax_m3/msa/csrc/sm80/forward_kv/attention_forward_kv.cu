#include "attention_forward_kv.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../../common/cuda_check.h"
#include "../../common/dispatch.h"
#include "../../common/supported.h"
#include "../../common/workspace.h"
#include "config.h"
#include "inverse_lists.cuh"

namespace msa::sm80 {

namespace {

void check_supported(const ForwardParams& params) {
  if (params.num_kv_heads < 1 || params.num_heads != params.num_kv_heads * kGroup) {
    throw std::runtime_error("the KV-major forward needs 16 query heads per key/value head, got " +
                             std::to_string(params.num_heads) + " and " +
                             std::to_string(params.num_kv_heads));
  }
  check_topk(params.topk, 64);
  check_block_size(params.block_size);
}

// Partial output and sums of a pair, and a place in the pair list.
int64_t pair_bytes(const ForwardParams& params) {
  return static_cast<int64_t>(kGroup) * (params.head_dim * 2 + 4) + 4;
}

}  // namespace

int64_t forward_kv_part_tokens(const ForwardParams& params) {
  constexpr int64_t kTile = 8;
  const int64_t token_bytes = token_pairs(params) * pair_bytes(params);
  const int64_t wanted = kWantedQueries * params.total_k / params.block_size / params.topk;
  const int64_t bytes = std::clamp(wanted * token_bytes, kPartialBytes, kMostPartialBytes);
  const int64_t all = (params.total_q + kTile - 1) / kTile * kTile;
  return std::clamp(bytes / token_bytes / kTile * kTile, kTile, std::max(all, kTile));
}

int64_t attention_forward_kv_workspace(const ForwardParams& params) {
  check_supported(params);
  return bucket_bytes(params) +
         forward_kv_part_tokens(params) * token_pairs(params) * pair_bytes(params) +
         3 * kWorkspaceAlignment;
}

void launch_inverse_lists(const ForwardParams& params, const KvSchedule& schedule, int tile_queries,
                          cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t tokens = schedule.token_end - schedule.token_begin;
  const auto grid = static_cast<unsigned>((tokens * token_pairs(params) + kThreads - 1) / kThreads);
  MSA_CHECK_CUDA(cudaMemsetAsync(schedule.bucket_count, 0, schedule.num_buckets * 4ll, stream));
  count_pairs_kernel<<<grid, kThreads, 0, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
  scan_buckets_kernel<<<1, 1024, 0, stream>>>(schedule, tile_queries);
  MSA_CHECK_LAUNCH();
  fill_lists_kernel<<<grid, kThreads, 0, stream>>>(params, schedule);
  MSA_CHECK_LAUNCH();
}

void launch_forward_kv(const ForwardParams& params, const TileOrder* order, void* workspace,
                       int64_t workspace_bytes, PartialAttentionLauncher launch_partial,
                       cudaStream_t stream) {
  const int64_t needed = attention_forward_kv_workspace(params);
  if (workspace_bytes < needed) {
    throw std::runtime_error("workspace holds " + std::to_string(workspace_bytes) +
                             " bytes, the KV-major forward needs " + std::to_string(needed));
  }
  const int64_t part = forward_kv_part_tokens(params);

  constexpr double kLog2E = 1.44269504088896340736;
  KvSchedule schedule;
  schedule.scale_log2 = static_cast<float>(params.softmax_scale * kLog2E);
  Workspace pieces(workspace);
  const int64_t max_pairs = part * token_pairs(params);
  schedule.partial_out = pieces.take(max_pairs * kGroup * params.head_dim * 2);
  schedule.partial_lse = pieces.take_floats(max_pairs * kGroup);
  schedule.pair_list = pieces.take_integers(max_pairs);
  take_buckets(schedule, params, pieces);

  for (int64_t begin = 0; begin < params.total_q; begin += part) {
    const int64_t end = std::min<int64_t>(begin + part, params.total_q);
    schedule.token_begin = static_cast<int>(begin);
    schedule.token_end = static_cast<int>(end);
    if (order != nullptr) {
      schedule.is_query_major = order->is_query_major;
      schedule.has_kv = order->has_kv + begin / part;
    }
    launch_inverse_lists(params, schedule, kTileQueries, stream);
    launch_partial(params, schedule, stream);
    dispatch_dtype(params.dtype, [&](auto element) {
      dispatch_head_dim(params.head_dim, [&](auto head_dim) {
        launch_combine_partials<decltype(element), decltype(head_dim)::value>(params, schedule,
                                                                              stream);
      });
    });
  }
}

void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream) {
  dispatch_dtype(params.dtype, [&](auto element) {
    dispatch_head_dim(params.head_dim, [&](auto head_dim) {
      launch_partial_attention<decltype(element), decltype(head_dim)::value>(params, schedule,
                                                                             stream);
    });
  });
}

}  // namespace msa::sm80
