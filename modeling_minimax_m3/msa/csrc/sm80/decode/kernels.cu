#include "kernels.h"

#include "smxx/common/dispatch.h"

namespace msa::sm80 {

void launch_index_scores(const DecodeSelectParams& params, cudaStream_t stream) {
  dispatch(params.dtype, params.head_dim, [&](auto element, auto head_dim) {
    launch_index_scores<decltype(element), head_dim.value>(params, stream);
  });
}

void launch_split_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  dispatch(params.dtype, params.head_dim, [&](auto element, auto head_dim) {
    launch_split_attention<decltype(element), head_dim.value>(params, stream);
  });
}

}  // namespace msa::sm80
