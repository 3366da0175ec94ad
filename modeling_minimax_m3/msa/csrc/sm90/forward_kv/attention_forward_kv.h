// Partial attention of the KV-major forward on Hopper; the meaning and the workspace are those of
// sm80/forward_kv/attention_forward_kv.h.
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"
#include "../../sm80/forward_kv/schedule.h"

namespace msa::sm90 {

// All tiles of a part: head dimension 128 and block size 128 only. Asynchronous on `stream`; reads
// nothing on the host, allocates nothing. Needs a device of compute capability 9.0. Throws
// std::runtime_error on a CUDA error.
void launch_partial_attention(const ForwardParams& params, const sm80::KvSchedule& schedule,
                              cudaStream_t stream);

// One launch; each instantiation is compiled in a file of its own.
template <typename Element>
void launch_partial_attention(const ForwardParams& params, const sm80::KvSchedule& schedule,
                              cudaStream_t stream);

}  // namespace msa::sm90
