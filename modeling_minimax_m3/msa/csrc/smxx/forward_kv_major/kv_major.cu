#include "kv_major.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "config.h"
#include "inverse_lists.cuh"
#include "smxx/common/cuda_check.h"
#include "smxx/common/logarithms.h"
#include "smxx/common/supported.h"
#include "smxx/common/workspace.h"

namespace msa {

namespace {

void check_supported(const ForwardParams& params) {
  if (params.num_kv_heads < 1 || params.num_heads != params.num_kv_heads * kQHeadsPerKv) {
    throw std::runtime_error("the KV-major forward needs 16 query heads per key/value head, got " +
                             std::to_string(params.num_heads) + " and " +
                             std::to_string(params.num_kv_heads));
  }
  check_topk(params.topk);
  check_block_size(params.block_size);
}

// Partial output and sums of a pair.
int64_t pair_bytes(const ForwardParams& params) {
  return static_cast<int64_t>(kQHeadsPerKv) * (params.head_dim * 2 + 4);
}

int64_t num_parts(const ForwardParams& params) {
  const int64_t part = forward_kv_part_tokens(params);
  return (params.total_q + part - 1) / part;
}

// Integers of a part's pair list and its tiles.
int64_t list_integers(const ForwardParams& params) {
  const int64_t part = forward_kv_part_tokens(params);
  return part * token_pairs(params) + max_tiles(params, part, kTileQueries);
}

// Parts whose lists exist at a time.
int64_t listed_parts(const ForwardParams& params) {
  const int64_t part_bytes = bucket_bytes(params) + list_integers(params) * 4;
  return std::clamp<int64_t>(kListBytes / part_bytes, 1, std::max<int64_t>(num_parts(params), 1));
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
  const int64_t pairs = forward_kv_part_tokens(params) * token_pairs(params);
  const int64_t parts = listed_parts(params);
  return pairs * pair_bytes(params) + bucket_bytes(params, parts) +
         parts * list_integers(params) * 4 + 4 * kWorkspaceAlignment;
}

void launch_inverse_lists(const ForwardParams& params, const KvParts& parts, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t pairs = parts.part_tokens * token_pairs(params);
  const dim3 grid(static_cast<unsigned>((pairs + kThreads - 1) / kThreads), parts.count);
  const int64_t places = parts.count * (parts.first.num_buckets + 1ll);
  MSA_CHECK_CUDA(cudaMemsetAsync(parts.first.bucket_count, 0, places * 4, stream));
  count_pairs_kernel<<<grid, kThreads, 0, stream>>>(params, parts);
  MSA_CHECK_LAUNCH();
  scan_buckets_kernel<<<dim3(1, parts.count), 1024, 0, stream>>>(parts);
  MSA_CHECK_LAUNCH();
  fill_lists_kernel<<<grid, kThreads, 0, stream>>>(params, parts);
  MSA_CHECK_LAUNCH();
}

void launch_inverse_lists(const ForwardParams& params, const KvSchedule& part,
                          cudaStream_t stream) {
  KvParts parts{};
  parts.first = part;
  parts.count = 1;
  parts.part_tokens = part.token_end - part.token_begin;
  parts.token_end = part.token_end;
  launch_inverse_lists(params, parts, stream);
}

void launch_forward_kv(const ForwardParams& params, const TileOrder* order, void* workspace,
                       int64_t workspace_bytes, PartialAttentionLauncher launch_partial,
                       cudaStream_t stream) {
  const int64_t needed = attention_forward_kv_workspace(params);
  if (workspace_bytes < needed) {
    throw std::runtime_error("workspace holds " + std::to_string(workspace_bytes) +
                             " bytes, the KV-major forward needs " + std::to_string(needed));
  }

  const int64_t all_parts = num_parts(params), listed = listed_parts(params);
  KvParts parts{};
  parts.part_tokens = static_cast<int>(forward_kv_part_tokens(params));
  parts.token_end = params.total_q;
  const int64_t part_pairs = parts.part_tokens * token_pairs(params);
  parts.part_pairs = static_cast<int>(part_pairs);
  parts.part_tiles = static_cast<int>(max_tiles(params, parts.part_tokens, kTileQueries));

  Workspace pieces(workspace);
  KvSchedule& first = parts.first;
  first.tile_queries = kTileQueries;
  first.scale_log2 = scale_log2(params.softmax_scale);
  first.partial_out = pieces.take(part_pairs * kQHeadsPerKv * params.head_dim * 2);
  first.partial_lse = pieces.take_floats(part_pairs * kQHeadsPerKv);
  first.pair_list = pieces.take_integers(listed * part_pairs);
  first.tile_bucket = pieces.take_integers(listed * parts.part_tiles);
  take_buckets(first, params, pieces, listed);
  if (order != nullptr) first.is_query_major = order->is_query_major;

  for (int64_t begin = 0; begin < all_parts; begin += listed) {
    parts.count = static_cast<int>(std::min(listed, all_parts - begin));
    first.token_begin = static_cast<int>(begin * parts.part_tokens);
    if (order != nullptr) first.has_kv = order->has_kv + begin;
    launch_inverse_lists(params, parts, stream);
    for (int number = 0; number < parts.count; ++number) {
      const KvSchedule part = parts.part(number);
      launch_partial(params, part, stream);
      launch_combine_partials(params, part, stream);
    }
  }
}

}  // namespace msa
