// The kernels that read a cache, for smxx/decode/decode.h.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace msa::sm80 {

// An IndexScoresLauncher and a SplitAttentionLauncher. They throw std::runtime_error on an
// unsupported head dimension or a CUDA error.
void launch_index_scores(const DecodeSelectParams& params, cudaStream_t stream);
void launch_split_attention(const DecodeAttentionParams& params, cudaStream_t stream);

// Each instantiation is compiled in a file of its own.
template <typename Element, int kHeadDim>
void launch_index_scores(const DecodeSelectParams& params, cudaStream_t stream);
template <typename Element, int kHeadDim>
void launch_split_attention(const DecodeAttentionParams& params, cudaStream_t stream);

}  // namespace msa::sm80
