// Attention over the selected blocks of packed sequences.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "fill_params.h"
#include "tensors.h"

namespace msa::api {

ForwardParams packed_attention_params(const Tensor& query, const Tensor& key,
                                      const std::optional<Tensor>& block_indices,
                                      const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                      int64_t block_size, double softmax_scale) {
  ForwardParams params{};
  params.query = vector_data("query", query);
  params.key = vector_data("key", key);
  params.query_token_stride = query.stride(0);
  params.query_head_stride = query.stride(1);
  params.key_token_stride = key.stride(0);
  params.key_head_stride = key.stride(1);
  params.total_q = to_int("total_q", query.size(0));
  params.total_k = to_int("total_k", key.size(0));
  fill_sequences(params, cu_seqlens_q, cu_seqlens_k);
  fill_attention_sizes(params, query, key, block_size, softmax_scale);
  if (block_indices.has_value()) {
    STD_TORCH_CHECK(block_indices->scalar_type() == ScalarType::Int &&
                        (block_indices->size(2) == 1 || block_indices->stride(2) == 1),
                    "`block_indices` must be int32 and contiguous in its last dimension");
    params.block_indices = static_cast<const int32_t*>(block_indices->const_data_ptr());
    params.index_token_stride = block_indices->stride(0);
    params.index_head_stride = block_indices->stride(1);
    params.topk = to_int("topk", block_indices->size(2));
  } else {
    params.topk = to_int("total_k", (key.size(0) + block_size - 1) / block_size);
  }
  return params;
}

ForwardParams forward_params(const Tensor& query, const Tensor& key, const Tensor& value,
                             const Tensor& block_indices, const Tensor& cu_seqlens_q,
                             const Tensor& cu_seqlens_k, int64_t block_size, double softmax_scale) {
  ForwardParams params = packed_attention_params(query, key, block_indices, cu_seqlens_q,
                                                 cu_seqlens_k, block_size, softmax_scale);
  params.value = vector_data("value", value);
  params.value_token_stride = value.stride(0);
  params.value_head_stride = value.stride(1);
  return params;
}

namespace {

std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, const Tensor& block_indices,
                                                  const Tensor& cu_seqlens_q,
                                                  const Tensor& cu_seqlens_k, int64_t block_size,
                                                  double softmax_scale) {
  const int64_t total_q = query.size(0), num_heads = query.size(1), head_dim = query.size(2);
  Tensor out = torch::stable::new_empty(query, {total_q, num_heads, head_dim});
  Tensor lse = torch::stable::new_empty(query, {total_q, num_heads}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  if (key.size(0) == 0 || block_indices.size(2) == 0) {
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {torch::stable::fill_(out, 0), lse};
  }
  ForwardParams params = forward_params(query, key, value, block_indices, cu_seqlens_q,
                                        cu_seqlens_k, block_size, softmax_scale);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());

  const DeviceScope device(query);
  const int64_t bytes = attention_forward_workspace(params);
  Tensor workspace = allocate_workspace_bytes(query, bytes);
  launch_attention_forward(params, device.choose(kForwardKernels, params),
                           workspace.mutable_data_ptr(), bytes, device.stream());
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def(
      "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor block_indices, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, float softmax_scale) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
}

}  // namespace msa::api
