// Block selection and attention of a few new tokens per row, read straight from a cache.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "fill_params.h"
#include "tensors.h"

namespace msa::api {

namespace {

CacheParams cache_params(const Tensor& cache, const Tensor& cache_seqlens,
                         const std::optional<Tensor>& cache_leftpad,
                         const std::optional<Tensor>& block_table) {
  CacheParams params{};
  params.cache_seqlens = int32_data("cache_seqlens", cache_seqlens);
  params.cache_leftpad = int32_data("cache_leftpad", cache_leftpad);
  params.block_table = int32_data("block_table", block_table);
  int64_t slots = cache.size(1);
  if (block_table.has_value()) {
    params.block_table_stride = block_table->stride(0);
    params.page_size = to_int("page_size", cache.size(1));
    params.num_pages = to_int("num_pages", cache.size(0));
    slots *= block_table->size(1);
  }
  params.max_slots = to_int("max_slots", slots);
  return params;
}

// Rows without a slot have no keys; the kernels are not asked to divide nothing.
bool is_empty(const Tensor& cache, const CacheParams& params) {
  return cache.size(0) == 0 || params.max_slots == 0;
}

Tensor select_blocks_with_kvcache(const Tensor& index_query, const Tensor& index_key_cache,
                                  const Tensor& cache_seqlens,
                                  const std::optional<Tensor>& cache_leftpad,
                                  const std::optional<Tensor>& block_table, int64_t block_size,
                                  int64_t topk, int64_t local_blocks, int64_t init_blocks) {
  const int64_t batch = index_query.size(0), num_new = index_query.size(1);
  const int64_t num_heads = index_query.size(2);
  Tensor block_indices =
      torch::stable::new_empty(index_query, {batch, num_new, num_heads, topk}, ScalarType::Int);
  if (block_indices.numel() == 0) return block_indices;

  DecodeSelectParams params{};
  params.cache = cache_params(index_key_cache, cache_seqlens, cache_leftpad, block_table);
  if (is_empty(index_key_cache, params.cache)) return torch::stable::fill_(block_indices, -1);
  params.index_query = vector_data("index_query", index_query);
  params.index_key_cache = vector_data("index_key_cache", index_key_cache);
  params.block_indices = static_cast<int32_t*>(block_indices.mutable_data_ptr());
  fill_query_strides(params, index_query);
  params.key_row_stride = index_key_cache.stride(0);
  params.key_slot_stride = index_key_cache.stride(1);
  params.batch = to_int("batch", batch);
  params.num_new = to_int("num_new", num_new);
  fill_selection_sizes(params, index_query, block_size, topk, local_blocks, init_blocks);

  const DeviceScope device(index_query);
  params.num_sms = device.num_sms();
  const Tensor workspace = fill_workspace(params, index_query, decode_select_workspace(params));
  launch_decode_select(params, device.choose(kIndexScoreKernels, params), device.stream());
  return block_indices;
}

Tensor block_sparse_attention_with_kvcache(const Tensor& query, const Tensor& key_cache,
                                           const Tensor& value_cache, const Tensor& block_indices,
                                           const Tensor& cache_seqlens,
                                           const std::optional<Tensor>& cache_leftpad,
                                           const std::optional<Tensor>& block_table,
                                           int64_t block_size, double softmax_scale) {
  const int64_t batch = query.size(0), num_new = query.size(1);
  const int64_t num_heads = query.size(2), head_dim = query.size(3);
  Tensor out = torch::stable::new_empty(query, {batch, num_new, num_heads, head_dim});
  if (out.numel() == 0) return out;

  DecodeAttentionParams params{};
  params.cache = cache_params(key_cache, cache_seqlens, cache_leftpad, block_table);
  if (is_empty(key_cache, params.cache) || block_indices.size(3) == 0) {
    return torch::stable::fill_(out, 0);
  }
  params.query = vector_data("query", query);
  params.key_cache = vector_data("key_cache", key_cache);
  params.value_cache = vector_data("value_cache", value_cache);
  params.block_indices = int32_data("block_indices", block_indices);
  params.out = out.mutable_data_ptr();
  fill_query_strides(params, query);
  params.key_row_stride = key_cache.stride(0);
  params.key_slot_stride = key_cache.stride(1);
  params.key_head_stride = key_cache.stride(2);
  params.value_row_stride = value_cache.stride(0);
  params.value_slot_stride = value_cache.stride(1);
  params.value_head_stride = value_cache.stride(2);
  params.batch = to_int("batch", batch);
  params.num_new = to_int("num_new", num_new);
  params.topk = to_int("topk", block_indices.size(3));
  fill_attention_sizes(params, query, key_cache, block_size, softmax_scale);

  const DeviceScope device(query);
  params.num_sms = device.num_sms();
  const Tensor workspace = fill_workspace(params, query, decode_attention_workspace(params));
  launch_decode_attention(params, device.choose(kSplitAttentionKernels, params), device.stream());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_m3_msa_cuda, library) {
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
  library.impl("select_blocks_with_kvcache", TORCH_BOX(&select_blocks_with_kvcache));
  library.impl("block_sparse_attention_with_kvcache",
               TORCH_BOX(&block_sparse_attention_with_kvcache));
}

}  // namespace msa::api
