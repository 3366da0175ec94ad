// Tells torch about the operators: schemas without mutation, kernels for CUDA tensors only.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY(minimax_m3_msa_cuda, library) {
  library.def(
      "select_blocks(Tensor index_query, Tensor index_key, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, int block_size, int topk, int local_blocks, int init_blocks) "
      "-> Tensor");
  library.def(
      "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor block_indices, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, float softmax_scale) "
      "-> (Tensor, Tensor)");
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
  library.impl("block_sparse_attention", TORCH_BOX(&msa::api::block_sparse_attention));
  library.impl("select_blocks_with_kvcache", TORCH_BOX(&msa::api::select_blocks_with_kvcache));
  library.impl("block_sparse_attention_with_kvcache",
               TORCH_BOX(&msa::api::block_sparse_attention_with_kvcache));
}
