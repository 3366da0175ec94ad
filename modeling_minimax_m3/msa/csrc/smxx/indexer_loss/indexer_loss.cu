#include "indexer_loss.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "config.h"
#include "loss_sums.cuh"
#include "smxx/common/cuda_check.h"
#include "smxx/common/dispatch.h"
#include "smxx/common/logarithms.h"
#include "smxx/common/supported.h"
#include "smxx/common/workspace.h"
#include "smxx/forward_kv_major/kv_major.h"
#include "sorted_lists.cuh"

namespace msa {

namespace {

void check_supported(const IndexerLossParams& params) {
  const ForwardParams& attention = params.attention;
  check_q_heads_per_kv(attention.num_heads, attention.num_kv_heads);
  // Over all keys it is the number of blocks, which has no limit.
  if (attention.block_indices != nullptr || attention.topk < 1) check_topk(attention.topk);
  check_block_size(attention.block_size);
}

// What grows with the keys.
int64_t key_bytes(const IndexerLossParams& params, LossPass pass) {
  const int64_t lists = bucket_bytes(params.attention);
  if (pass == LossPass::kValue) return lists;
  const int64_t sums = static_cast<int64_t>(params.attention.total_k) * params.index_dim * 4;
  return lists + align(sums) + align((buckets_per_head(params.attention) + 1ll) * 4) +
         kWorkspaceAlignment;
}

int64_t score_gradient_bytes(const IndexerLossParams& params) {
  return params.saved_tokens < params.attention.total_q ? params.attention.block_size * 2 : 0;
}

// A place in the pair list, and terms or, of the gradient, an unsorted list, score gradients and
// the sums for the index query.
int64_t pair_bytes(const IndexerLossParams& params, LossPass pass) {
  if (pass == LossPass::kValue) return 4 + 16;
  return 4 + 4 + score_gradient_bytes(params) + params.index_dim * 4;
}

constexpr int kAllocations = 4;  // that grow with the pairs, at most

}  // namespace

int64_t indexer_loss_workspace(const IndexerLossParams& params, LossPass pass) {
  check_supported(params);
  const int64_t token_bytes = token_pairs(params.attention) * pair_bytes(params, pass);
  const int64_t tokens = std::clamp<int64_t>(kIndexerLossBytes / token_bytes, 1,
                                             std::max(params.attention.total_q, 1));
  return key_bytes(params, pass) + tokens * token_bytes + kAllocations * kWorkspaceAlignment;
}

void launch_indexer_loss(const IndexerLossParams& params, LossPass pass,
                         const IndexerLossKernels& kernels, void* workspace,
                         int64_t workspace_bytes, cudaStream_t stream) {
  check_supported(params);
  const ForwardParams& attention = params.attention;
  if (attention.total_q == 0) return;
  const bool is_gradient = pass == LossPass::kGradient;
  const int64_t room =
      workspace_bytes - key_bytes(params, pass) - kAllocations * kWorkspaceAlignment;
  int64_t part = std::min<int64_t>(room / (token_pairs(attention) * pair_bytes(params, pass)),
                                   attention.total_q);
  if (is_gradient) part = std::min(part, kMaxSortedTokens);
  if (part < 1) {
    throw std::runtime_error("workspace holds " + std::to_string(workspace_bytes) +
                             " bytes, the indexer's loss needs " +
                             std::to_string(indexer_loss_workspace(params, pass)));
  }

  IndexerLossSchedule schedule = {};
  KvSchedule& lists = schedule.lists;
  lists.tile_queries = IndexerLossConfig::kTilePairs;
  lists.scale_log2 = scale_log2(attention.softmax_scale);
  schedule.index_scale_log2 = scale_log2(params.index_scale);
  Workspace pieces(workspace);
  const int64_t max_pairs = part * token_pairs(attention);
  take_buckets(lists, attention, pieces);
  lists.pair_list = pieces.take_integers(max_pairs);
  int32_t* sorted_list = nullptr;
  int64_t sums_bytes = 0;
  if (is_gradient) {
    sorted_list = pieces.take_integers(max_pairs);
    schedule.score_gradients = pieces.take(max_pairs * score_gradient_bytes(params));
    schedule.partial_index_query = pieces.take_floats(max_pairs * params.index_dim);
    schedule.factors = pieces.take_floats(2);
    schedule.block_turn = pieces.take_integers(lists.buckets_per_head + 1ll);
    schedule.next_tile = schedule.block_turn + lists.buckets_per_head;
    sums_bytes = static_cast<int64_t>(attention.total_k) * params.index_dim * 4;
    schedule.index_key_sums = reinterpret_cast<float*>(pieces.take(sums_bytes));
    MSA_CHECK_CUDA(cudaMemsetAsync(schedule.index_key_sums, 0, sums_bytes, stream));
    scale_gradients_kernel<<<1, 1024, 0, stream>>>(params, schedule.factors);
    MSA_CHECK_LAUNCH();
  } else {
    schedule.terms = reinterpret_cast<float4*>(pieces.take(max_pairs * 16));
  }

  auto launch_part = [&](int64_t begin, int64_t end, bool is_saved) {
    const int tokens = static_cast<int>(end - begin);
    lists.token_begin = static_cast<int>(begin);
    lists.token_end = static_cast<int>(end);
    schedule.max_tiles = static_cast<int>(max_tiles(attention, tokens, lists.tile_queries));
    const int64_t pairs_before = begin * token_pairs(attention);
    schedule.saved_probs =
        is_saved ? static_cast<__half*>(params.saved_probs) + pairs_before * attention.block_size
                 : nullptr;
    launch_inverse_lists(attention, lists, stream);
    if (!is_gradient) {
      kernels.launch_block_terms(params, schedule, pass, stream);
      const int64_t rows = static_cast<int64_t>(tokens) * attention.num_kv_heads;
      const auto grid = static_cast<unsigned>((rows + kCombineRowWarps - 1) / kCombineRowWarps);
      combine_terms_kernel<<<grid, 32 * kCombineRowWarps, 0, stream>>>(params, schedule);
      MSA_CHECK_LAUNCH();
      return;
    }
    IndexerLossSchedule sorted = schedule;
    sorted.lists.pair_list = sorted_list;
    sort_lists_kernel<<<lists.num_buckets, kSortThreads, sort_bytes(tokens), stream>>>(
        sorted.lists, lists.pair_list, static_cast<int>(token_pairs(attention)));
    MSA_CHECK_LAUNCH();
    if (!is_saved) kernels.launch_block_terms(params, sorted, pass, stream);
    MSA_CHECK_CUDA(
        cudaMemsetAsync(schedule.block_turn, 0, (lists.buckets_per_head + 1ll) * 4, stream));
    kernels.launch_index_gradients(params, sorted, stream);
    launch_combine_index_query(params, sorted, stream);
  };
  // Parts of a stretch of tokens are equally large: a small one would take almost as long.
  auto launch_parts = [&](int64_t begin, int64_t end, bool is_saved) {
    const int64_t parts = (end - begin + part - 1) / part;
    for (int64_t i = 0; i < parts; ++i) {
      launch_part(begin + (end - begin) * i / parts, begin + (end - begin) * (i + 1) / parts,
                  is_saved);
    }
  };
  launch_parts(0, params.saved_tokens, true);
  launch_parts(params.saved_tokens, attention.total_q, false);

  if (!is_gradient) return;
  constexpr int kThreads = 256;
  const int64_t channel_pairs = static_cast<int64_t>(attention.total_k) * params.index_dim / 2;
  const auto grid = static_cast<unsigned>((channel_pairs + kThreads - 1) / kThreads);
  dispatch_dtype(attention.dtype, [&](auto element) {
    round_index_key_kernel<decltype(element)><<<grid, kThreads, 0, stream>>>(params, schedule);
    MSA_CHECK_LAUNCH();
  });
}

}  // namespace msa
