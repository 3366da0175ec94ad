// Query-major attention forward, for smxx/forward_order/attention_forward.h.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/forward_order/tile_order.h"

namespace msa::sm80 {

// Writes params.out and params.lse of the tiles that are query-major by `order` (with 16 query
// heads per key/value head only), or of all of them if it is nullptr. Throws std::runtime_error on
// unsupported sizes or a CUDA error.
void launch_query_major(const ForwardParams& params, const TileOrder* order, cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element, int kHeadDim>
void launch_query_major(const ForwardParams& params, const TileOrder* order, cudaStream_t stream);

}  // namespace msa::sm80
