// The operators of the extension, in the order and meaning of `reference.py`.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace msa::api {

using torch::stable::Tensor;

Tensor select_blocks(const Tensor& index_query, const Tensor& index_key, const Tensor& cu_seqlens_q,
                     const Tensor& cu_seqlens_k, int64_t block_size, int64_t topk,
                     int64_t local_blocks, int64_t init_blocks);

std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, const Tensor& block_indices,
                                                  const Tensor& cu_seqlens_q,
                                                  const Tensor& cu_seqlens_k, int64_t block_size,
                                                  double softmax_scale);

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
