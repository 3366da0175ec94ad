// Linear layers with MXFP8 weights for up to four tokens.
#pragma once

#include "few_token_linear.h"

namespace msa {

// Whether `launch_few_token_linear_mxfp8` takes the call: its weights are MXFP8, it has at most
// four tokens, the channels are a multiple of 256, and the rows of each weight are a multiple
// of 16.
bool supports_few_token_linear_mxfp8(const FewTokenLinearParams& params);

void launch_few_token_linear_mxfp8(const FewTokenLinearParams& params, cudaStream_t stream);

}  // namespace msa
