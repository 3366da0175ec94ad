// Query-major attention forward on Hopper: the meaning is that of
// sm80/forward/attention_forward.h.
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"
#include "../../sm80/forward_order/tile_order.h"

namespace msa::sm90 {

// Whether the kernel takes calls of these sizes: head dimension and block size 128, 16 query heads
// a group, a positive scale.
bool takes_forward_q(const ForwardParams& params);

// Writes params.out and params.lse of the tiles that are query-major by `order`, or of all of them
// if it is nullptr. Asynchronous on `stream`; reads nothing on the host, allocates nothing. Needs a
// device of compute capability 9.0. Throws std::runtime_error on a CUDA error.
void launch_attention_forward_q(const ForwardParams& params, const sm80::TileOrder* order,
                                cudaStream_t stream);

// One launch; each instantiation is compiled in a file of its own.
template <typename Element>
void launch_forward_q_kernel(const ForwardParams& params, const sm80::TileOrder* order,
                             cudaStream_t stream);

}  // namespace msa::sm90
