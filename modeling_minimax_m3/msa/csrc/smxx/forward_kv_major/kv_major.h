// KV-major attention forward: the results of a query-major one, faster where neighbouring queries
// choose different blocks. 16 query heads per key/value head only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"
#include "schedule.h"
#include "smxx/forward_order/tile_order.h"

namespace msa {

// Bytes of scratch to allocate (16-byte aligned): partial outputs of a part of the queries, and
// integers.
int64_t attention_forward_kv_workspace(const ForwardParams& params);

// Query tokens of a part, a multiple of 8: as many as kPartialBytes of partial outputs take, or up
// to kMostPartialBytes for long sequences, if there are so many.
int64_t forward_kv_part_tokens(const ForwardParams& params);

// The partial outputs of one part: all of its tiles.
using PartialAttentionLauncher = void (*)(const ForwardParams&, const KvSchedule&, cudaStream_t);

// Their sums: all rows of a part.
void launch_combine_partials(const ForwardParams& params, const KvSchedule& schedule,
                             cudaStream_t stream);

// Writes params.out and params.lse of the tiles that are KV-major by `order`, or of all of them if
// it is nullptr; `launch_partial` gives the partial outputs. Asynchronous on `stream`; reads
// nothing on the host, allocates nothing. Throws std::runtime_error on unsupported sizes, a short
// workspace or a CUDA error.
void launch_forward_kv(const ForwardParams& params, const TileOrder* order, void* workspace,
                       int64_t workspace_bytes, PartialAttentionLauncher launch_partial,
                       cudaStream_t stream);

// The inverse lists of these parts, or of one. The order within a bucket varies from run to run.
void launch_inverse_lists(const ForwardParams& params, const KvParts& parts, cudaStream_t stream);
void launch_inverse_lists(const ForwardParams& params, const KvSchedule& part, cudaStream_t stream);
}  // namespace msa
