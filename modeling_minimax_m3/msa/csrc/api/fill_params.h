// Fields that several kinds of params share, filled from the tensors that say them.
#pragma once

#include <cstdint>
#include <optional>

#include "tensors.h"

namespace msa::api {

// Sizes of an attention call: `query` (..., num_heads, head_dim), `key` (..., num_kv_heads,
// head_dim).
template <typename Params>
void fill_attention_sizes(Params& params, const Tensor& query, const Tensor& key,
                          int64_t block_size, double softmax_scale) {
  params.num_heads = to_int("num_heads", query.size(query.dim() - 2));
  params.num_kv_heads = to_int("num_kv_heads", key.size(key.dim() - 2));
  params.head_dim = to_int("head_dim", query.size(query.dim() - 1));
  params.block_size = to_int("block_size", block_size);
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.dtype = dtype_of("query", query);
}

// Sizes of a selection: `index_query` (..., num_heads, head_dim).
template <typename Params>
void fill_selection_sizes(Params& params, const Tensor& index_query, int64_t block_size,
                          int64_t topk, int64_t local_blocks, int64_t init_blocks) {
  params.num_heads = to_int("num_heads", index_query.size(index_query.dim() - 2));
  params.head_dim = to_int("head_dim", index_query.size(index_query.dim() - 1));
  params.block_size = to_int("block_size", block_size);
  params.topk = to_int("topk", topk);
  params.local_blocks = to_int("local_blocks", local_blocks);
  params.init_blocks = to_int("init_blocks", init_blocks);
  params.dtype = dtype_of("index_query", index_query);
}

// Strides of queries of a batch.
template <typename Params>
void fill_query_strides(Params& params, const Tensor& query) {
  params.query_batch_stride = query.stride(0);
  params.query_token_stride = query.stride(1);
  params.query_head_stride = query.stride(2);
}

// Number of packed sequences, and where they begin and end.
template <typename Params>
void fill_sequences(Params& params, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  params.cu_seqlens_q = int32_data("cu_seqlens_q", cu_seqlens_q);
  params.cu_seqlens_k = int32_data("cu_seqlens_k", cu_seqlens_k);
  params.batch = to_int("batch", cu_seqlens_q.size(0) - 1);
}

// Scratch memory of so many floats; params hold its address, the result keeps it alive.
template <typename Params>
Tensor fill_workspace(Params& params, const Tensor& like, int64_t elements) {
  Tensor workspace = allocate_workspace(like, elements);
  params.workspace_elements = elements;
  params.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  return workspace;
}

// All params of packed attention except values and outputs. Without `block_indices` it goes over
// all keys, and topk is the number of blocks that a sequence of all of them would have.
ForwardParams packed_attention_params(const Tensor& query, const Tensor& key,
                                      const std::optional<Tensor>& block_indices,
                                      const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                      int64_t block_size, double softmax_scale);

// The same with values, still without outputs.
ForwardParams forward_params(const Tensor& query, const Tensor& key, const Tensor& value,
                             const Tensor& block_indices, const Tensor& cu_seqlens_q,
                             const Tensor& cu_seqlens_k, int64_t block_size, double softmax_scale);

}  // namespace msa::api
