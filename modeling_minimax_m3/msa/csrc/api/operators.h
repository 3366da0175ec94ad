// The operators of the extension, in the order and meaning of `reference.py`.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "params.h"

namespace msa::api {

using torch::stable::Tensor;

Tensor select_blocks(const Tensor& index_query, const Tensor& index_key, const Tensor& cu_seqlens_q,
                     const Tensor& cu_seqlens_k, int64_t block_size, int64_t topk,
                     int64_t local_blocks, int64_t init_blocks);

Tensor structured_blocks_of(const Tensor& own_block, int64_t num_kv_heads, int64_t layer_idx,
                            int64_t local_blocks, int64_t anchor_blocks, int64_t anchor_stride,
                            int64_t random_blocks, int64_t seed);

std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, const Tensor& block_indices,
                                                  const Tensor& cu_seqlens_q,
                                                  const Tensor& cu_seqlens_k, int64_t block_size,
                                                  double softmax_scale);

std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Tensor& block_indices, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t block_size, double softmax_scale);

// The inputs of a call of block_sparse_attention, checked; without its outputs.
ForwardParams forward_params(const Tensor& query, const Tensor& key, const Tensor& value,
                             const Tensor& block_indices, const Tensor& cu_seqlens_q,
                             const Tensor& cu_seqlens_k, int64_t block_size, double softmax_scale);

// Writes saved_probs, which may have no tokens; the gradient reads them.
std::tuple<Tensor, Tensor> indexer_kl_loss(const Tensor& index_query, const Tensor& index_key,
                                           const Tensor& query, const Tensor& key,
                                           const Tensor& lse,
                                           const std::optional<Tensor>& block_indices,
                                           const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                           int64_t block_size, double softmax_scale,
                                           double index_scale, const Tensor& saved_probs);

std::tuple<Tensor, Tensor> indexer_kl_loss_backward(
    const Tensor& grad_kl, const Tensor& index_query, const Tensor& index_key, const Tensor& query,
    const Tensor& key, const Tensor& lse, const Tensor& index_lse,
    const std::optional<Tensor>& block_indices, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t block_size, double softmax_scale, double index_scale,
    const Tensor& saved_probs);

Tensor select_blocks_with_kvcache(const Tensor& index_query, const Tensor& index_key_cache,
                                  const Tensor& cache_seqlens,
                                  const std::optional<Tensor>& cache_leftpad,
                                  const std::optional<Tensor>& block_table, int64_t block_size,
                                  int64_t topk, int64_t local_blocks, int64_t init_blocks);

Tensor block_sparse_attention_with_kvcache(const Tensor& query, const Tensor& key_cache,
                                           const Tensor& value_cache, const Tensor& block_indices,
                                           const Tensor& cache_seqlens,
                                           const std::optional<Tensor>& cache_leftpad,
                                           const std::optional<Tensor>& block_table,
                                           int64_t block_size, double softmax_scale);

}  // namespace msa::api
