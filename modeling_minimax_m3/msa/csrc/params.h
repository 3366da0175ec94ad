// Plain descriptions of one call, shared by the API layer and the kernels.
//
// Nothing here knows torch. Pointers are device pointers; every stride is counted in elements (not
// bytes) and the last dimension of a strided operand is contiguous. Offsets are 64 bit, because
// a long context times its heads and head dimension passes 2^31 elements; counts fit 32 bits, which
// the API layer checks.
#pragma once

#include <cstdint>

namespace msa {

enum class Dtype { kFloat16, kBFloat16 };

// Block selection over packed sequences.
struct SelectParams {
  const void* index_query;      // (total_q, num_heads, head_dim), strided
  const void* index_key;        // (total_k, head_dim), strided; one head shared by all query heads
  const int32_t* cu_seqlens_q;  // (batch + 1)
  const int32_t* cu_seqlens_k;  // (batch + 1)
  int32_t* block_indices;       // (total_q, num_heads, topk), contiguous output
  float* workspace;             // (workspace_elements), scratch; see select_blocks_workspace
  int64_t workspace_elements;
  int64_t query_token_stride;
  int64_t query_head_stride;
  int64_t key_token_stride;
  int total_q;
  int total_k;
  int batch;
  int num_heads;
  int head_dim;
  int block_size;
  int topk;
  int local_blocks;
  int init_blocks;
  Dtype dtype;
};

// Block lists by position alone: local window, anchors, random blocks.
struct StructuredParams {
  const int64_t* own_block;  // (num_queries), block of each query; a negative one lists nothing
  int32_t* block_indices;    // (num_queries, num_kv_heads, width), contiguous output
  int num_queries;
  int num_kv_heads;
  int width;  // local_blocks + anchor_blocks + the least number of random blocks
  int local_blocks;
  int anchor_blocks;
  int64_t anchor_stride;  // at most 2^31, which is as good as anything above
  uint32_t layer;
  uint32_t seed_low;
  uint32_t seed_high;
  int num_sms;  // of the current device, to choose how many queries a thread block takes
};

// Attention over the selected blocks of packed sequences.
struct ForwardParams {
  const void* query;             // (total_q, num_heads, head_dim), strided
  const void* key;               // (total_k, num_kv_heads, head_dim), strided
  const void* value;             // (total_k, num_kv_heads, head_dim), strided
  const int32_t* block_indices;  // (total_q, num_kv_heads, topk), strided
  const int32_t* cu_seqlens_q;   // (batch + 1)
  const int32_t* cu_seqlens_k;   // (batch + 1)
  void* out;                     // (total_q, num_heads, head_dim), contiguous output
  float* lse;  // (total_q, num_heads), contiguous output; natural log, -inf for rows without key
  int64_t query_token_stride;
  int64_t query_head_stride;
  int64_t key_token_stride;
  int64_t key_head_stride;
  int64_t value_token_stride;
  int64_t value_head_stride;
  int64_t index_token_stride;
  int64_t index_head_stride;
  int total_q;
  int total_k;
  int batch;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int block_size;
  int topk;
  float softmax_scale;
  Dtype dtype;
};

// Gradient of attention over the selected blocks of packed sequences.
struct BackwardParams {
  ForwardParams forward;  // the call whose gradient this is; its out and lse are inputs here
  const void* grad_out;   // (total_q, num_heads, head_dim), strided
  void* grad_query;       // (total_q, num_heads, head_dim), contiguous output
  void* grad_key;         // (total_k, num_kv_heads, head_dim), contiguous output
  void* grad_value;       // (total_k, num_kv_heads, head_dim), contiguous output
  int64_t grad_out_token_stride;
  int64_t grad_out_head_stride;
};

// KL divergence of the indexer's softmax from the main attention's over the same keys, and its
// gradient. `attention` describes the main attention: its value and out are unused, its lse is an
// input, and its block_indices may be nullptr, for all keys up to the query's own; topk is then the
// number of blocks that a sequence of all keys would have.
struct IndexerLossParams {
  ForwardParams attention;
  const void* index_query;  // (total_q, num_kv_heads, index_dim), strided
  const void* index_key;    // (total_k, index_dim), strided; one head shared by all query heads
  int64_t index_query_token_stride;
  int64_t index_query_head_stride;
  int64_t index_key_token_stride;
  int index_dim;
  float index_scale;
  // The attention's mean probabilities of the first `saved_tokens` query tokens, times
  // kSavedProbsScale in float16, which the value leaves for the gradient: (saved_tokens,
  // num_kv_heads, topk, block_size), contiguous; not written for places that name no block with a
  // key that the query sees.
  void* saved_probs;
  int saved_tokens;
  float* kl;               // (total_q, num_kv_heads), contiguous output of the value
  float* index_lse;        // (total_q, num_kv_heads), contiguous; natural log; written by the value
  const float* grad_kl;    // (total_q, num_kv_heads), contiguous; the gradient only, as all below
  void* grad_index_query;  // (total_q, num_kv_heads, index_dim), contiguous output
  void* grad_index_key;    // (total_k, index_dim), contiguous output
};

// Where the rows of a key-value cache lie and how far they are filled.
struct CacheParams {
  const int32_t* cache_seqlens;  // (batch), valid slots of a row, the new tokens included
  const int32_t* cache_leftpad;  // (batch), first valid slot of a row, or nullptr for zeros
  const int32_t* block_table;    // (batch, pages_per_row), or nullptr for a contiguous cache
  int64_t block_table_stride;    // between rows of block_table
  int page_size;                 // slots of a page; unused without block_table
  int num_pages;                 // pages of the cache; unused without block_table
  int max_slots;                 // S_max, or pages_per_row * page_size
};

// Block selection of the newest tokens against a cache.
struct DecodeSelectParams {
  const void* index_query;      // (batch, num_new, num_heads, head_dim), strided
  const void* index_key_cache;  // (batch, S_max, head_dim) or (num_pages, page_size, head_dim)
  CacheParams cache;
  int32_t* block_indices;  // (batch, num_new, num_heads, topk), contiguous output
  float* workspace;        // (workspace_elements), scratch; see decode_select_workspace
  int64_t workspace_elements;
  int64_t query_batch_stride;
  int64_t query_token_stride;
  int64_t query_head_stride;
  int64_t key_row_stride;  // per batch row, or per page of a paged cache
  int64_t key_slot_stride;
  int batch;
  int num_new;
  int num_heads;
  int head_dim;
  int block_size;
  int topk;
  int local_blocks;
  int init_blocks;
  int num_sms;  // of the current device, to choose how far a row is split
  Dtype dtype;
};

// Attention of the newest tokens over the selected blocks of a cache.
struct DecodeAttentionParams {
  const void* query;        // (batch, num_new, num_heads, head_dim), strided
  const void* key_cache;    // (batch, S_max, num_kv_heads, head_dim) or (num_pages, page_size, ...)
  const void* value_cache;  // like key_cache, with strides of its own
  const int32_t* block_indices;  // (batch, num_new, num_kv_heads, topk), contiguous
  CacheParams cache;
  void* out;         // (batch, num_new, num_heads, head_dim), contiguous output
  float* workspace;  // (workspace_elements), scratch; see decode_attention_workspace
  int64_t workspace_elements;
  int64_t query_batch_stride;
  int64_t query_token_stride;
  int64_t query_head_stride;
  int64_t key_row_stride;  // per batch row, or per page of a paged cache
  int64_t key_slot_stride;
  int64_t key_head_stride;
  int64_t value_row_stride;
  int64_t value_slot_stride;
  int64_t value_head_stride;
  int batch;
  int num_new;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int block_size;
  int topk;
  int num_sms;  // of the current device, to choose how far a row is split
  float softmax_scale;
  Dtype dtype;
};

}  // namespace msa
