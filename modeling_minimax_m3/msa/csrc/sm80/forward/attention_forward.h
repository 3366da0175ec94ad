// Attention forward for prefill, query-major: see ../../../README.md for the meaning, ../README.md
// for the plan.
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"
#include "../forward_order/tile_order.h"

namespace msa::sm80 {

// Writes params.out and params.lse of the tiles that are query-major by `order` (with 16 query
// heads a group only), or of all of them if it is nullptr. Asynchronous on `stream`; reads nothing
// on the host, allocates nothing. Throws std::runtime_error on unsupported sizes or a CUDA error.
void launch_attention_forward_q(const ForwardParams& params, const TileOrder* order,
                                cudaStream_t stream);

// One launch; each instantiation is compiled in a file of its own.
template <typename Element, int kHeadDim>
void launch_forward_kernel(const ForwardParams& params, const TileOrder* order,
                           cudaStream_t stream);

}  // namespace msa::sm80
