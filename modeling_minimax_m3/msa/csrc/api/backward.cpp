// Gradients of attention over the selected blocks of packed sequences.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "fill_params.h"
#include "tensors.h"

namespace msa::api {

namespace {

std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Tensor& block_indices, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t block_size, double softmax_scale) {
  const int64_t total_q = query.size(0), num_heads = query.size(1), head_dim = query.size(2);
  const int64_t total_k = key.size(0), num_kv_heads = key.size(1);
  Tensor grad_query = torch::stable::new_empty(query, {total_q, num_heads, head_dim});
  Tensor grad_key = torch::stable::new_empty(key, {total_k, num_kv_heads, head_dim});
  Tensor grad_value = torch::stable::new_empty(value, {total_k, num_kv_heads, head_dim});
  if (query.numel() == 0 || key.numel() == 0 || block_indices.size(2) == 0) {
    return {torch::stable::fill_(grad_query, 0), torch::stable::fill_(grad_key, 0),
            torch::stable::fill_(grad_value, 0)};
  }
  STD_TORCH_CHECK(out.is_contiguous(), "`out` must be contiguous");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(),
                  "`lse` must be float32 and contiguous");

  BackwardParams params{};
  params.forward = forward_params(query, key, value, block_indices, cu_seqlens_q, cu_seqlens_k,
                                  block_size, softmax_scale);
  params.forward.out = const_cast<void*>(vector_data("out", out));
  params.forward.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  params.grad_out = vector_data("grad_out", grad_out);
  params.grad_query = grad_query.mutable_data_ptr();
  params.grad_key = grad_key.mutable_data_ptr();
  params.grad_value = grad_value.mutable_data_ptr();
  params.grad_out_token_stride = grad_out.stride(0);
  params.grad_out_head_stride = grad_out.stride(1);

  const DeviceScope device(query);
  const int64_t bytes = attention_backward_workspace(params);
  Tensor workspace = allocate_workspace_bytes(query, bytes);
  launch_attention_backward(params, device.choose(kBlockGradientKernels, params),
                            workspace.mutable_data_ptr(), bytes, device.stream());
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
  library.def(
      "block_sparse_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor block_indices, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int block_size, float softmax_scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_attention_backward));
}

}  // namespace msa::api
