// Query-major attention forward on Hopper, for smxx/forward_order/attention_forward.h.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/forward_order/tile_order.h"

namespace msa::sm90 {

// Whether this kernel, and the KV-major one beside it, take calls of these sizes: head dimension
// and block size 128, 16 query heads per key/value head, a positive scale.
bool supports_forward(const ForwardParams& params);

// Writes params.out and params.lse of the tiles that are query-major by `order`, or of all of them
// if it is nullptr. Throws std::runtime_error on a CUDA error.
void launch_query_major(const ForwardParams& params, const TileOrder* order, cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element>
void launch_query_major(const ForwardParams& params, const TileOrder* order, cudaStream_t stream);

}  // namespace msa::sm90
