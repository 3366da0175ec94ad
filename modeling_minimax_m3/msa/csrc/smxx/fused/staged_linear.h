// Linear layers of one or two tokens with MXFP8 weights.
#pragma once

#include <cuda_runtime_api.h>

#include "few_token_linear.h"

namespace msa {

bool supports_staged_linear(const FewTokenLinearParams& params);

void launch_staged_linear(const FewTokenLinearParams& params, cudaStream_t stream);

}  // namespace msa
