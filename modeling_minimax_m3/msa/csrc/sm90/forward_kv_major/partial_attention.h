// Partial attention of the KV-major forward on Hopper, for smxx/forward_kv_major/kv_major.h.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/forward_kv_major/schedule.h"

namespace msa::sm90 {

// All tiles of a part. Head dimension 128 and block size 128 only. Throws std::runtime_error on a
// CUDA error.
void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element>
void launch_partial_attention(const ForwardParams& params, const KvSchedule& schedule,
                              cudaStream_t stream);

}  // namespace msa::sm90
