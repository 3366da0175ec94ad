// The indexer's loss over packed sequences, and its gradient.
#include <limits>

#include "operators.h"
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
                              const Tensor& saved_probabilities) {
  IndexerLossParams params{};
  ForwardParams& attention = params.attention;
  attention.query = vector_data("query", query);
  attention.key = vector_data("key", key);
  attention.cu_seqlens_q = int32_data("cu_seqlens_q", cu_seqlens_q);
  attention.cu_seqlens_k = int32_data("cu_seqlens_k", cu_seqlens_k);
  attention.lse = float_data("lse", lse);
  attention.query_token_stride = query.stride(0);
  attention.query_head_stride = query.stride(1);
  attention.key_token_stride = key.stride(0);
  attention.key_head_stride = key.stride(1);
  attention.total_q = to_int("total_q", query.size(0));
  attention.total_k = to_int("total_k", key.size(0));
  attention.batch = to_int("batch", cu_seqlens_q.size(0) - 1);
  attention.num_heads = to_int("num_heads", query.size(1));
  attention.num_kv_heads = to_int("num_kv_heads", key.size(1));
  attention.head_dim = to_int("head_dim", query.size(2));
  attention.block_size = to_int("block_size", block_size);
  attention.softmax_scale = static_cast<float>(softmax_scale);
  attention.dtype = dtype_of("query", query);
  if (block_indices.has_value()) {
    STD_TORCH_CHECK(block_indices->scalar_type() == ScalarType::Int &&
                        (block_indices->size(2) == 1 || block_indices->stride(2) == 1),
                    "`block_indices` must be int32 and contiguous in its last dimension");
    attention.block_indices = static_cast<const int32_t*>(block_indices->const_data_ptr());
    attention.index_token_stride = block_indices->stride(0);
    attention.index_head_stride = block_indices->stride(1);
    attention.topk = to_int("topk", block_indices->size(2));
  } else {
    attention.topk = to_int("total_k", (key.size(0) + block_size - 1) / block_size);
  }

  params.index_query = vector_data("index_query", index_query);
  params.index_key = vector_data("index_key", index_key);
  params.index_query_token_stride = index_query.stride(0);
  params.index_query_head_stride = index_query.stride(1);
  params.index_key_token_stride = index_key.stride(0);
  params.index_dim = to_int("index_dim", index_query.size(2));
  params.index_scale = static_cast<float>(index_scale);

  const int64_t saved_tokens = saved_probabilities.size(0);
  if (saved_tokens > 0) {
    const Tensor& saved = saved_probabilities;
    STD_TORCH_CHECK(block_indices.has_value(), "there is no list of blocks to save `",
                    "saved_probabilities` by");
    STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Half && saved.is_contiguous() &&
                        saved.dim() == 4 && saved_tokens <= query.size(0) &&
                        saved.size(1) == key.size(1) && saved.size(2) == block_indices->size(2) &&
                        saved.size(3) == block_size,
                    "`saved_probabilities` must be contiguous float16 of the shape (up to "
                    "total_q, H_kv, topk, block_size)");
    vector_data("saved_probabilities", saved);  // checks where it lies
    params.saved_probabilities = saved.mutable_data_ptr();
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
  constexpr int64_t kFloatBytes = sizeof(float);
  const DeviceScope device(like);
  const int64_t bytes = indexer_loss_workspace(params, pass);
  Tensor workspace = allocate_workspace(like, (bytes + kFloatBytes - 1) / kFloatBytes);
  const IndexerLossKernels kernels{device.choose(kBlockTermKernels, params),
                                   device.choose(kIndexGradientKernels, params)};
  launch_indexer_loss(params, pass, kernels, workspace.mutable_data_ptr(), bytes, device.stream());
}

}  // namespace

std::tuple<Tensor, Tensor> indexer_kl_loss(const Tensor& index_query, const Tensor& index_key,
                                           const Tensor& query, const Tensor& key,
                                           const Tensor& lse,
                                           const std::optional<Tensor>& block_indices,
                                           const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                           int64_t block_size, double softmax_scale,
                                           double index_scale, const Tensor& saved_probabilities) {
  const int64_t total_q = index_query.size(0), num_heads = index_query.size(1);
  Tensor kl = torch::stable::new_empty(index_query, {total_q, num_heads}, ScalarType::Float);
  Tensor index_lse = torch::stable::new_empty(index_query, {total_q, num_heads}, ScalarType::Float);
  if (is_empty(query, key, block_indices)) {
    torch::stable::fill_(index_lse, -std::numeric_limits<double>::infinity());
    return {torch::stable::fill_(kl, 0), index_lse};
  }
  IndexerLossParams params =
      loss_params(index_query, index_key, query, key, lse, block_indices, cu_seqlens_q,
                  cu_seqlens_k, block_size, softmax_scale, index_scale, saved_probabilities);
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
    const Tensor& saved_probabilities) {
  Tensor grad_index_query = torch::stable::new_empty(
      index_query, {index_query.size(0), index_query.size(1), index_query.size(2)});
  Tensor grad_index_key =
      torch::stable::new_empty(index_key, {index_key.size(0), index_key.size(1)});
  if (is_empty(query, key, block_indices)) {
    return {torch::stable::fill_(grad_index_query, 0), torch::stable::fill_(grad_index_key, 0)};
  }
  IndexerLossParams params =
      loss_params(index_query, index_key, query, key, lse, block_indices, cu_seqlens_q,
                  cu_seqlens_k, block_size, softmax_scale, index_scale, saved_probabilities);
  params.index_lse = float_data("index_lse", index_lse);
  params.grad_kl = float_data("grad_kl", grad_kl);
  params.grad_index_query = grad_index_query.mutable_data_ptr();
  params.grad_index_key = grad_index_key.mutable_data_ptr();
  launch(params, LossPass::kGradient, query);
  return {grad_index_query, grad_index_key};
}

}  // namespace msa::api
