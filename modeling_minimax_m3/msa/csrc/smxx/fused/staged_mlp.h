// Gated MLPs of one or two tokens with MXFP8 weights.
#pragma once

#include <cuda_runtime_api.h>

#include "few_token_mlp.h"

namespace msa {

bool supports_staged_mlp(const FewTokenMlpParams& params);

// The experts of several tokens are listed.
void launch_staged_mlp(const FewTokenMlpParams& params, cudaStream_t stream);

}  // namespace msa
