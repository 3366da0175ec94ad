// Attention forward for prefill, the loop order chosen tile by tile.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../params.h"
#include "../forward_kv/attention_forward_kv.h"
#include "tile_order.h"

namespace msa::sm80 {

// Bytes of scratch to allocate (16-byte aligned); 0 when the sizes of the call already say that all
// of it runs query-major.
int64_t attention_forward_workspace(const ForwardParams& params);

// Writes params.out and params.lse. `workspace_bytes` is what attention_forward_workspace returned
// for the same sizes. Asynchronous on `stream`; reads nothing on the host, allocates nothing.
// Throws std::runtime_error on unsupported sizes or a CUDA error.
void launch_attention_forward(const ForwardParams& params, void* workspace, int64_t workspace_bytes,
                              cudaStream_t stream);

// The same with other kernels.
struct ForwardKernels {
  OrderRule rule;
  void (*query_major)(const ForwardParams&, const TileOrder*, cudaStream_t);
  PartialAttentionLauncher kv_major;
};
void launch_attention_forward(const ForwardParams& params, const ForwardKernels& kernels,
                              void* workspace, int64_t workspace_bytes, cudaStream_t stream);

}  // namespace msa::sm80
