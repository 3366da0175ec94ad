// Decoding: block selection and attention of a few new tokens per row, against a cache.
//
// All functions are asynchronous on `stream`, allocate nothing and read nothing on the host, so
// that a CUDA graph can capture them. They throw std::runtime_error on what they do not support
// and on CUDA errors. The workspace may hold anything before and after.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace msa {

// The scores of all rows, and the attention over shares of the selected blocks: the kernels that an
// architecture may have of its own.
using IndexScoresLauncher = void (*)(const DecodeSelectParams&, cudaStream_t);
using SplitAttentionLauncher = void (*)(const DecodeAttentionParams&, cudaStream_t);

// Floats of scratch that launch_decode_select needs: a score per query row and key block.
int64_t decode_select_workspace(const DecodeSelectParams& params);
void launch_decode_select(const DecodeSelectParams& params, IndexScoresLauncher launch_index_scores,
                          cudaStream_t stream);

// Floats of scratch that launch_decode_attention needs: partial outputs, 0 where rows are not
// split.
int64_t decode_attention_workspace(const DecodeAttentionParams& params);
void launch_decode_attention(const DecodeAttentionParams& params,
                             SplitAttentionLauncher launch_split_attention, cudaStream_t stream);

}  // namespace msa
