// The indexer's loss over packed sequences, and its gradient.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "fill_params.h"
#include "tensors.h"

namespace msa::api {

namespace {

float* float_data(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), "`", name,
                  "` must be float32 and contiguous");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

IndexerLossParams loss_params(const Tensor& index_query, const Tensor& index_key,
                              const Tensor& query, const Tensor& key, const Tensor& lse,
                              const std::optional<Tensor>& block_indices,
                              const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                              int64_t block_size, double softmax_scale, double index_scale,
                              const Tensor& saved_probs) {
  IndexerLossParams params{};
  params.attention = packed_attention_params(query, key, block_indices, cu_seqlens_q, cu_seqlens_k,
                                             block_size, softmax_scale);
  params.attention.lse = float_data("lse", lse);

  params.index_query = vector_data("index_query", index_query);
  params.index_key = vector_data("index_key", index_key);
  params.index_query_token_stride = index_query.stride(0);
  params.index_query_head_stride = index_query.stride(1);
  params.index_key_token_stride = index_key.stride(0);
  params.index_dim = to_int("index_dim", index_query.size(2));
  params.index_scale = static_cast<float>(index_scale);

  const int64_t saved_tokens = saved_probs.size(0);
  if (saved_tokens > 0) {
    STD_TORCH_CHECK(block_indices.has_value(), "there is no list of blocks to save `",
                    "saved_probs` by");
    STD_TORCH_CHECK(saved_probs.scalar_type() == ScalarType::Half && saved_probs.is_contiguous() &&
                        saved_probs.dim() == 4 && saved_tokens <= query.size(0) &&
                        saved_probs.size(1) == key.size(1) &&
                        saved_probs.size(2) == block_indices->size(2) &&
                        saved_probs.size(3) == block_size,
                    "`saved_probs` must be contiguous float16 of the shape (up to "
                    "total_q, H_kv, topk, block_size)");
    vector_data("saved_probs", saved_probs);  // checks where it lies
    params.saved_probs = saved_probs.mutable_data_ptr();
    params.saved_tokens = to_int("saved_tokens", saved_tokens);
  }
  return params;
}

// No query has a key.
bool is_empty(const Tensor& query, const Tensor& key, const std::optional<Tensor>& block_indices) {
  return query.numel() == 0 || key.size(0) == 0 ||
         (block_indices.has_value() && block_indices->size(2) == 0);
}

void launch(const IndexerLossParams& params, LossPass pass, const Tensor& like) {
  const DeviceScope device(like);
  const int64_t bytes = indexer_loss_workspace(params, pass);
  Tensor workspace = allocate_workspace_bytes(like, bytes);
  const IndexerLossKernels kernels{device.choose(kBlockTermKernels, params),
                                   device.choose(kIndexGradientKernels, params)};
  launch_indexer_loss(params, pass, kernels, workspace.mutable_data_ptr(), bytes, device.stream());
}

// Writes saved_probs, which may have no tokens; the gradient reads them.
std::tuple<Tensor, Tensor> indexer_kl_loss(const Tensor& index_query, const Tensor& index_key,
                                           const Tensor& query, const Tensor& key,
                                           const Tensor& lse,
                                           const std::optional<Tensor>& block_indices,
                                           const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                           int64_t block_size, double softmax_scale,
                                           double index_scale, const Tensor& saved_probs) {
  const int64_t total_q = index_query.size(0), num_heads = index_query.size(1);
  Tensor kl = torch::stable::new_empty(index_query, {total_q, num_heads}, ScalarType::Float);
  Tensor index_lse = torch::stable::new_empty(index_query, {total_q, num_heads}, ScalarType::Float);
  if (is_empty(query, key, block_indices)) {
    torch::stable::fill_(index_lse, -std::numeric_limits<double>::infinity());
    return {torch::stable::fill_(kl, 0), index_lse};
  }
  IndexerLossParams params =
      loss_params(index_query, index_key, query, key, lse, block_indices, cu_seqlens_q,
                  cu_seqlens_k, block_size, softmax_scale, index_scale, saved_probs);
  params.kl = static_cast<float*>(kl.mutable_data_ptr());
  params.index_lse = static_cast<float*>(index_lse.mutable_data_ptr());
  launch(params, LossPass::kValue, query);
  return {kl, index_lse};
}

std::tuple<Tensor, Tensor> indexer_kl_loss_backward(
    const Tensor& grad_kl, const Tensor& index_query, const Tensor& index_key, const Tensor& query,
    const Tensor& key, const Tensor& lse, const Tensor& index_lse,
    const std::optional<Tensor>& block_indices, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t block_size, double softmax_scale, double index_scale,
    const Tensor& saved_probs) {
  Tensor grad_index_query = torch::stable::new_empty(
      index_query, {index_query.size(0), index_query.size(1), index_query.size(2)});
  Tensor grad_index_key =
      torch::stable::new_empty(index_key, {index_key.size(0), index_key.size(1)});
  if (is_empty(query, key, block_indices)) {
    return {torch::stable::fill_(grad_index_query, 0), torch::stable::fill_(grad_index_key, 0)};
  }
  IndexerLossParams params =
      loss_params(index_query, index_key, query, key, lse, block_indices, cu_seqlens_q,
                  cu_seqlens_k, block_size, softmax_scale, index_scale, saved_probs);
  params.index_lse = float_data("index_lse", index_lse);
  params.grad_kl = float_data("grad_kl", grad_kl);
  params.grad_index_query = grad_index_query.mutable_data_ptr();
  params.grad_index_key = grad_index_key.mutable_data_ptr();
  launch(params, LossPass::kGradient, query);
  return {grad_index_query, grad_index_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
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
}

STABLE_TORCH_LIBRARY_IMPL(minimax_m3_msa_cuda, CUDA, library) {
  library.impl("indexer_kl_loss", TORCH_BOX(&indexer_kl_loss));
  library.impl("indexer_kl_loss_backward", TORCH_BOX(&indexer_kl_loss_backward));
}

}  // namespace msa::api
