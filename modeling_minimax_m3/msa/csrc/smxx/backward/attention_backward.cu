#include "attention_backward.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "config.h"
#include "row_kernels.cuh"
#include "smxx/common/cuda_check.h"
#include "smxx/common/dispatch.h"
#include "smxx/common/logarithms.h"
#include "smxx/common/supported.h"
#include "smxx/common/workspace.h"
#include "smxx/forward_kv_major/kv_major.h"
#include "sort_lists.cuh"

namespace msa {

namespace {

unsigned blocks_of(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

void check_supported(const ForwardParams& params) {
  check_q_heads_per_kv(params.num_heads, params.num_kv_heads);
  check_topk(params.topk);
  check_block_size(params.block_size);
}

int64_t key_elements(const ForwardParams& params) {
  return static_cast<int64_t>(params.total_k) * params.num_kv_heads * params.head_dim;
}

// Partial gradients of one query token.
int64_t partial_bytes(const ForwardParams& params) {
  return static_cast<int64_t>(params.num_heads) * params.topk * params.head_dim * 2;
}

// What the queries of a part take, where there are so many parts.
int64_t part_bytes(const ForwardParams& params, int64_t tokens, int64_t parts) {
  return std::min<int64_t>(parts, kBuffers) * align(tokens * partial_bytes(params)) +
         align(tokens * token_pairs(params) * 4);
}

// Query tokens of a part: all, or as many as two buffers take.
int64_t part_tokens(const ForwardParams& params) {
  if (params.total_q * partial_bytes(params) <= kPartialGradBytes) return params.total_q;
  return std::max<int64_t>(kPartialGradBytes / kBuffers / partial_bytes(params), 1);
}

// Everything but the parts.
int64_t fixed_bytes(const ForwardParams& params) {
  return align(static_cast<int64_t>(params.total_q) * params.num_heads * 4) +
         2 * align(key_elements(params) * 4) + bucket_bytes(params) + bucket_array_bytes(params);
}

// Few tiles mean that loading a block and adding its sums weigh little; many, that all
// multiprocessors are busy.
int choose_tile_queries(int64_t pairs, int q_heads_per_kv) {
  constexpr int64_t kTiles = 1024;
  constexpr int64_t kLeastRows = 1024, kMostRows = 8192;
  constexpr int64_t kStep = 64;
  const int64_t queries =
      std::clamp(pairs / kTiles, kLeastRows / q_heads_per_kv, kMostRows / q_heads_per_kv);
  return static_cast<int>((queries + kStep - 1) / kStep * kStep);
}

}  // namespace

void launch_query_gradients(const BackwardParams& params, const BackwardSchedule& schedule,
                            cudaStream_t stream) {
  const unsigned grid = blocks_of(query_gradient_rows(params, schedule), kRowThreads / 32);
  dispatch(params.forward.dtype, params.forward.head_dim, [&](auto element, auto head_dim) {
    add_query_gradients_kernel<decltype(element), head_dim.value>
        <<<grid, kRowThreads, 0, stream>>>(params, schedule);
  });
  MSA_CHECK_LAUNCH();
}

int64_t attention_backward_workspace(const BackwardParams& params) {
  const ForwardParams& forward = params.forward;
  check_supported(forward);
  const int64_t part = part_tokens(forward);
  return fixed_bytes(forward) + part_bytes(forward, part, part < forward.total_q ? kBuffers : 1);
}

void launch_attention_backward(const BackwardParams& params,
                               BlockGradientsLauncher launch_gradients, void* workspace,
                               int64_t workspace_bytes, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  check_supported(forward);
  if (forward.total_q == 0 || forward.total_k == 0) return;
  const int64_t needed = attention_backward_workspace(params);
  if (workspace_bytes < needed) {
    throw std::runtime_error("workspace holds " + std::to_string(workspace_bytes) +
                             " bytes, the backward needs " + std::to_string(needed));
  }
  const int64_t part = part_tokens(forward);

  const int q_heads_per_kv = forward.num_heads / forward.num_kv_heads;
  BackwardSchedule schedule{};
  schedule.lists.scale_log2 = scale_log2(forward.softmax_scale);
  schedule.q_heads_shift = std::countr_zero(static_cast<unsigned>(q_heads_per_kv));
  Workspace pieces(workspace);
  const int64_t delta_rows = static_cast<int64_t>(forward.total_q) * forward.num_heads;
  auto* delta = pieces.take_floats(delta_rows);
  schedule.delta = delta;
  schedule.grad_key = pieces.take_floats(key_elements(forward));
  schedule.grad_value = pieces.take_floats(key_elements(forward));
  take_buckets(schedule.lists, forward, pieces);
  schedule.bucket_turn = pieces.take_integers(schedule.lists.num_buckets + 1ll);
  schedule.next_tile = schedule.bucket_turn + schedule.lists.num_buckets;
  const int64_t max_pairs = part * token_pairs(forward);
  void* partial_grad_query[kBuffers];
  for (int i = 0; i < (part < forward.total_q ? kBuffers : 1); ++i) {
    partial_grad_query[i] = pieces.take(max_pairs * q_heads_per_kv * forward.head_dim * 2);
  }
  schedule.lists.pair_list = pieces.take_integers(max_pairs);

  MSA_CHECK_CUDA(cudaMemsetAsync(schedule.grad_key, 0, key_elements(forward) * 4, stream));
  MSA_CHECK_CUDA(cudaMemsetAsync(schedule.grad_value, 0, key_elements(forward) * 4, stream));
  dispatch(forward.dtype, forward.head_dim, [&](auto element, auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    const unsigned grid = blocks_of(delta_rows, kRowThreads / (kHeadDim / 8));
    output_products_kernel<decltype(element), kHeadDim>
        <<<grid, kRowThreads, 0, stream>>>(params, delta);
  });
  MSA_CHECK_LAUNCH();

  BackwardSchedule before;
  for (int64_t begin = 0; begin < forward.total_q; begin += part) {
    const int64_t end = std::min<int64_t>(begin + part, forward.total_q);
    const int64_t pairs = (end - begin) * token_pairs(forward);
    schedule.lists.token_begin = static_cast<int>(begin);
    schedule.lists.token_end = static_cast<int>(end);
    schedule.lists.tile_queries = choose_tile_queries(pairs, q_heads_per_kv);
    schedule.max_tiles =
        static_cast<int>(max_tiles(forward, end - begin, schedule.lists.tile_queries));
    launch_inverse_lists(forward, schedule.lists, stream);
    sort_lists_kernel<<<schedule.lists.num_buckets, kSortThreads, 0, stream>>>(forward, schedule);
    MSA_CHECK_LAUNCH();
    schedule.partial_grad_query = partial_grad_query[begin / part % kBuffers];
    launch_gradients(params, schedule, begin > 0 ? &before : nullptr, stream);
    before = schedule;
  }
  launch_query_gradients(params, before, stream);

  const int64_t vectors = key_elements(forward) / 8;
  dispatch_dtype(forward.dtype, [&](auto element) {
    auto* round = round_gradients_kernel<decltype(element)>;
    const unsigned grid = blocks_of(vectors, kRowThreads);
    round<<<grid, kRowThreads, 0, stream>>>(schedule.grad_key, params.grad_key, vectors);
    MSA_CHECK_LAUNCH();
    round<<<grid, kRowThreads, 0, stream>>>(schedule.grad_value, params.grad_value, vectors);
    MSA_CHECK_LAUNCH();
  });
}

}  // namespace msa
