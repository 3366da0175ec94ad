// Gated MLPs of a few tokens: chosen experts and one MLP that sees every token, as two kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "few_token_weights.h"
#include "params.h"

namespace msa {

struct FewTokenMlpParams {
  const void* x;  // (num_tokens, hidden), contiguous
  // All of one form.
  FewTokenWeights gate_up;         // (2 * width, hidden), the MLP of every token
  FewTokenWeights down;            // (hidden, width)
  FewTokenWeights expert_gate_up;  // (num_experts, 2 * expert_width, hidden)
  FewTokenWeights expert_down;     // (num_experts, hidden, expert_width)
  const int64_t* expert_ids;    // (num_tokens, num_choices); others than 0 .. num_experts - 1 add 0
  const float* expert_weights;  // (num_tokens, num_choices)
  void* activations;            // workspace: (num_tokens * num_choices, expert_width), then
                                // (num_tokens, width)
  void* experts;                // workspace of few_token_mlp_lists_bytes() bytes
  void* out;                    // (num_tokens, hidden), contiguous output
  float alpha;                  // of SwiGLU-OAI
  float limit;
  float expert_scale;  // factor of the experts' weights
  int num_tokens;      // at most 16
  int num_choices;     // experts of a token, 0 where there are none; at most 256 in all
  int num_experts;
  int hidden;        // a multiple of 32, and so are the widths; of 64 for MXFP8 weights
  int width;         // 0: there is no MLP of every token
  int expert_width;  // 0: there are no experts
  Dtype dtype;
  bool
      weights_are_constant;  // no kernel before may have written them: they are read before its end
};

int64_t few_token_mlp_lists_bytes();

// Throws std::runtime_error for sizes that the kernels do not take.
void launch_few_token_mlp(const FewTokenMlpParams& params, cudaStream_t stream);

}  // namespace msa
