// Gated MLPs with MXFP8 weights for up to four tokens.
#pragma once

#include "few_token_mlp.h"

namespace msa {

// Whether `launch_few_token_mlp_mxfp8` takes the call: its weights are MXFP8, it has at most four
// tokens, the sizes are multiples of 256, and the activations fit the shared memory.
bool supports_few_token_mlp_mxfp8(const FewTokenMlpParams& params);

// `params.experts` lists the experts of several tokens, written by a kernel before.
void launch_few_token_mlp_mxfp8(const FewTokenMlpParams& params, cudaStream_t stream);

}  // namespace msa
