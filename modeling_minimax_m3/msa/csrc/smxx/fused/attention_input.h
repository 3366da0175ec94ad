// From the projections of a few tokens to the states that attention reads: norms of heads, partial
// rotary, and the new slots of a cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace msa {

struct CacheSlots {
  void* data;  // (batch, slots, heads, head_dim), strided; null: there is none
  int64_t row_stride;
  int64_t slot_stride;
  int64_t head_stride;
};

struct AttentionInputParams {
  const void* projected;  // (batch * num_new, all heads * head_dim), contiguous: query, key, value,
                          // index query, index key
  const void* query_norm;  // (head_dim) each; null for the index where there is none
  const void* key_norm;
  const void* index_query_norm;
  const void* index_key_norm;
  const void* cos;  // (batch or 1, num_new, rotary_channels), contiguous
  const void* sin;
  const int64_t* length;  // (1), slots in use before these tokens
  void* query;            // (batch, num_new, num_heads, head_dim), contiguous output
  void* index_query;      // (batch, num_new, num_index_heads, head_dim), contiguous output
  CacheSlots key;
  CacheSlots value;
  CacheSlots index_key;
  int64_t rotary_row_stride;  // 0: all rows have the same positions
  float eps;
  int batch;
  int num_new;
  int slots;
  int num_heads;
  int num_kv_heads;
  int num_index_heads;  // 0: there is no index
  int head_dim;         // 64 or 128
  int rotary_channels;  // a multiple of 16
  Dtype dtype;
  bool rotary_is_float;     // cos and sin are float32 instead of the states' dtype
  bool norms_are_constant;  // no kernel before may have written them: they are read before its end
};

// Cosines and sines of positions.
struct RotaryTableParams {
  const int64_t* positions;  // (num_positions)
  const float* frequencies;  // (channels / 2)
  void* cos;                 // (num_positions, channels), contiguous outputs
  void* sin;
  float scaling;  // factor of both
  int num_positions;
  int channels;
  Dtype dtype;
};

void launch_rotary_table(const RotaryTableParams& params, cudaStream_t stream);

// Throws std::runtime_error for sizes that the kernel does not take.
void launch_attention_input(const AttentionInputParams& params, cudaStream_t stream);

}  // namespace msa
