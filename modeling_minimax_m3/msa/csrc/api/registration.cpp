// Tells torch about the operators: kernels for CUDA tensors only. Nothing is mutated, but
// for the buffer that a loss leaves for its gradient.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY(minimax_m3_msa_cuda, library) {
  library.def(
      "select_blocks(Tensor index_query, Tensor index_key, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, int block_size, int topk, int local_blocks, int init_blocks) "
      "-> Tensor");
  library.def(
      "structured_blocks_of(Tensor own_block, int num_kv_heads, int layer_idx, int local_blocks, "
      "int anchor_blocks, int anchor_stride, int random_blocks, int seed) -> Tensor");
  library.def(
      "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor block_indices, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, float softmax_scale) "
      "-> (Tensor, Tensor)");
  library.def(
      "block_sparse_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor block_indices, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int block_size, float softmax_scale) -> (Tensor, Tensor, Tensor)");
  library.def(
      "indexer_kl_loss(Tensor index_query, Tensor index_key, Tensor query, Tensor key, Tensor lse, "
      "Tensor? block_indices, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, "
      "float softmax_scale, float index_scale, Tensor(a!) saved_probs) -> (Tensor, "
      "Tensor)");
  library.def(
      "indexer_kl_loss_backward(Tensor grad_kl, Tensor index_query, Tensor index_key, "
      "Tensor query, Tensor key, Tensor lse, Tensor index_lse, Tensor? block_indices, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, float softmax_scale, "
      "float index_scale, Tensor saved_probs) -> (Tensor, Tensor)");
  library.def(
      "select_blocks_with_kvcache(Tensor index_query, Tensor index_key_cache, "
      "Tensor cache_seqlens, Tensor? cache_leftpad, Tensor? block_table, int block_size, "
      "int topk, int local_blocks, int init_blocks) -> Tensor");
  library.def(
      "block_sparse_attention_with_kvcache(Tensor query, Tensor key_cache, Tensor value_cache, "
      "Tensor block_indices, Tensor cache_seqlens, Tensor? cache_leftpad, Tensor? block_table, "
      "int block_size, float softmax_scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("select_blocks", TORCH_BOX(&msa::api::select_blocks));
  library.impl("structured_blocks_of", TORCH_BOX(&msa::api::structured_blocks_of));
  library.impl("block_sparse_attention", TORCH_BOX(&msa::api::block_sparse_attention));
  library.impl("block_sparse_attention_backward",
               TORCH_BOX(&msa::api::block_sparse_attention_backward));
  library.impl("indexer_kl_loss", TORCH_BOX(&msa::api::indexer_kl_loss));
  library.impl("indexer_kl_loss_backward", TORCH_BOX(&msa::api::indexer_kl_loss_backward));
  library.impl("select_blocks_with_kvcache", TORCH_BOX(&msa::api::select_blocks_with_kvcache));
  library.impl("block_sparse_attention_with_kvcache",
               TORCH_BOX(&msa::api::block_sparse_attention_with_kvcache));
}
