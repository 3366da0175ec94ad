// Block selection over packed sequences.
#include <torch/csrc/stable/library.h>

#include "fill_params.h"
#include "tensors.h"

namespace msa::api {

namespace {

Tensor select_blocks(const Tensor& index_query, const Tensor& index_key, const Tensor& cu_seqlens_q,
                     const Tensor& cu_seqlens_k, int64_t block_size, int64_t topk,
                     int64_t local_blocks, int64_t init_blocks) {
  const int64_t total_q = index_query.size(0), num_heads = index_query.size(1);
  Tensor block_indices =
      torch::stable::new_empty(index_query, {total_q, num_heads, topk}, ScalarType::Int);
  if (block_indices.numel() == 0) return block_indices;
  if (index_key.size(0) == 0) return torch::stable::fill_(block_indices, -1);

  SelectParams params{};
  params.index_query = vector_data("index_query", index_query);
  params.index_key = vector_data("index_key", index_key);
  params.block_indices = static_cast<int32_t*>(block_indices.mutable_data_ptr());
  params.query_token_stride = index_query.stride(0);
  params.query_head_stride = index_query.stride(1);
  params.key_token_stride = index_key.stride(0);
  params.total_q = to_int("total_q", total_q);
  params.total_k = to_int("total_k", index_key.size(0));
  fill_sequences(params, cu_seqlens_q, cu_seqlens_k);
  fill_selection_sizes(params, index_query, block_size, topk, local_blocks, init_blocks);

  const DeviceScope device(index_query);
  const Tensor workspace = fill_workspace(params, index_query, select_blocks_workspace(params));
  launch_select_blocks(params, device.choose(kScoreKernels, params), device.stream());
  return block_indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def(
      "select_blocks(Tensor index_query, Tensor index_key, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, int block_size, int topk, int local_blocks, int init_blocks) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("select_blocks", TORCH_BOX(&select_blocks));
}

}  // namespace msa::api
