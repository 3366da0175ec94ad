// Attention forward for prefill, the loop order chosen tile by tile.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"
#include "smxx/forward_kv_major/kv_major.h"
#include "tile_order.h"

namespace msa {

// Bytes of scratch to allocate (16-byte aligned); 0 when the sizes of the call already say that all
// of it runs query-major.
int64_t attention_forward_workspace(const ForwardParams& params);

// The kernels of both orders, and when a tile goes query-major.
struct ForwardKernels {
  OrderRule rule;
  void (*query_major)(const ForwardParams&, const TileOrder*, cudaStream_t);
  PartialAttentionLauncher kv_major;
};

// Writes params.out and params.lse. `workspace_bytes` is what attention_forward_workspace returned
// for the same sizes. Asynchronous on `stream`; reads nothing on the host, allocates nothing.
// Throws std::runtime_error on unsupported sizes or a CUDA error.
void launch_attention_forward(const ForwardParams& params, const ForwardKernels& kernels,
                              void* workspace, int64_t workspace_bytes, cudaStream_t stream);

}  // namespace msa
