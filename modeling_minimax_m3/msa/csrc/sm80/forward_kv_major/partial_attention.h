// Partial attention of the KV-major forward, for smxx/forward_kv_major/kv_major.h.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/forward_kv_major/schedule.h"

namespace msa::sm80 {

// All tiles of a part. Throws std::runtime_error on an unsupported head dimension or
// a CUDA error.
void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element, int kHeadDim>
void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream);

}  // namespace msa::sm80
